"""Where Redis is, as `HEADRACE_REDIS_URL` says it: one server, a cluster, or a master that sentinels know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self
from urllib.parse import SplitResult, unquote, urlsplit

Node = tuple[str, int]
"""Host and port."""

FORMS: Final = (
    "redis://host:port/db, unix:///path, redis+cluster://host:port,host:port, "
    "redis+sentinel://host:port,host:port/master-name[/db]; rediss in place of redis for TLS"
)
_PORTS: Final = {"cluster": 6379, "sentinel": 26379}


@dataclass(frozen=True)
class Address:
    """A URL of Redis, taken apart.

    Attributes:
        kind: `server` is a single one.
        seeds: the nodes, or the sentinels, that are asked first; none for a single server.
        master: the name by which sentinels know the master.
    """

    kind: Literal["server", "cluster", "sentinel"]
    seeds: tuple[Node, ...]
    master: str
    _server: SplitResult

    def __str__(self) -> str:
        """Without user and password, for messages."""
        return ",".join(f"{host}:{port}" for host, port in self.seeds) + (f"/{self.master}" if self.master else "")

    @classmethod
    def parse(cls, url: str) -> Self:
        """Takes a URL apart.

        Raises:
            ValueError: if it is malformed. It says what would be right, and does not repeat what may hold a password.
        """
        parts = urlsplit(url)
        scheme, plus, kind = parts.scheme.partition("+")
        if not plus and scheme in {"redis", "rediss", "unix"}:
            return cls("server", (), "", parts)
        if scheme not in {"redis", "rediss"} or kind not in _PORTS:
            msg = f"an address of Redis is one of {FORMS}"
            raise ValueError(msg)
        login, at, hosts = parts.netloc.rpartition("@")
        seeds = tuple(_node(each, _PORTS[kind]) for each in hosts.split(","))
        master, _, db = parts.path.strip("/").partition("/")
        if kind == "cluster":
            if (master or "0", db) != ("0", ""):
                msg = "a Redis Cluster has one database: write redis+cluster://host:port,host:port without a path"
                raise ValueError(msg)
            master = ""
        elif not master or (db and not db.isdecimal()):
            msg = "name the master that sentinels are asked for: redis+sentinel://host:port,host:port/master-name[/db]"
            raise ValueError(msg)
        server = parts._replace(scheme=scheme, netloc=login + at, path=f"/{db or 0}")
        return cls("cluster" if kind == "cluster" else "sentinel", seeds, unquote(master), server)

    def url_of(self, node: Node) -> str:
        """The URL of one server of a cluster, or of a master."""
        return self._server._replace(netloc=self._server.netloc + _netloc(node)).geturl()

    def url_of_sentinel(self, node: Node) -> str:
        """The URL of a sentinel; user and password are the master's."""
        return self._server._replace(netloc=_netloc(node), path="/0").geturl()


def _netloc(node: Node) -> str:
    host, port = node
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _node(text: str, default_port: int) -> Node:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0:
        msg = f"{text!r} is no host:port; several are separated by commas, as in redis+cluster://a:6379,b:6379"
        raise ValueError(msg)
    return host, port or default_port
