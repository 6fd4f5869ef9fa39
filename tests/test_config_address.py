"""Where Redis is: every form of its URL, and what is wrong with a malformed one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from config.address import Address
from config.settings import Settings


@pytest.mark.parametrize(
    ("url", "kind", "seeds", "server"),
    [
        ("redis+cluster://a:1,b:2", "cluster", [("a", 1), ("b", 2)], "redis://h:9/0"),
        ("redis+cluster://a,[::1]:2/", "cluster", [("a", 6379), ("::1", 2)], "redis://h:9/0"),
        (
            "rediss+cluster://u:p%40@a:1/0?ssl_cert_reqs=none",
            "cluster",
            [("a", 1)],
            "rediss://u:p%40@h:9/0?ssl_cert_reqs=none",
        ),
        ("redis+sentinel://:p@a,b:2/the-master", "sentinel", [("a", 26379), ("b", 2)], "redis://:p@h:9/0"),
        ("rediss+sentinel://a/the-master/3", "sentinel", [("a", 26379)], "rediss://h:9/3"),
    ],
)
def test_several_servers_are_one_url(url: str, kind: str, seeds: list[tuple[str, int]], server: str) -> None:
    """Login, options and database are those of every server; a sentinel gets no login, which is the master's."""
    address = Address.parse(url)
    assert (address.kind, list(address.seeds), address.url_of(("h", 9))) == (kind, seeds, server)
    assert address.master == ("the-master" if kind == "sentinel" else "")
    assert "@" not in address.url_of_sentinel(("h", 9))
    assert address.url_of(("::1", 9)).startswith(server.partition("h:9")[0] + "[::1]:9")


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("redis+clutser://a:1", r"is one of redis://host:port/db, unix:///path, redis\+cluster://host:port,host:port"),
        ("http://a:1", "is one of redis://host:port/db"),
        ("redis+cluster://a:1,b:x", r"'b:x' is no host:port; several are separated by commas"),
        ("redis+cluster://", "'' is no host:port"),
        ("redis+cluster://:hunter2@a:1,:2", "':2' is no host:port"),
        ("redis+cluster://a:1/3", "has one database: write redis.cluster://host:port,host:port without a path"),
        ("redis+sentinel://a:1", r"name the master .*redis\+sentinel://host:port,host:port/master-name"),
        ("redis+sentinel://a:1/m/x", "name the master"),
    ],
)
def test_a_malformed_url_is_refused_by_the_settings(url: str, remedy: str) -> None:
    """The error names the field and says what to write; it does not repeat a password."""
    with pytest.raises(ValidationError, match=rf"redis_url\n.*{remedy}") as refused:
        Settings(redis_url=url)
    assert "hunter2" not in str(refused.value)
