"""API keys: a file of them, hashed, and what a server asks of a request that carries one.

A key is `id.secret`; the secret is 256 random bits. Of these no hash can be reversed by guessing, so that a plain
SHA-256 is enough: what slow hashes such as argon2 are for, passwords that people choose, is not here, and one of them a
request would cost more than the answer.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from serving.problems import Problem

Scope = Literal["read", "write", "admin"]
LOOK_S: Final = 1.0
"""How often a server looks whether the file has changed."""

log = structlog.get_logger()


class Key(BaseModel):
    """One caller: everything of its key but the secret."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
    name: str
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)
    scopes: frozenset[Scope]
    rate: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Requests a second of each server process; as many may come at once."""


class KeyFile(BaseModel):
    """The file, as JSON."""

    model_config = ConfigDict(extra="forbid")

    keys: list[Key] = []

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """What the file says.

        Raises:
            OSError: if it can't be read.
            ValueError: if it is no file of keys; without any of its values.
        """
        raw = path.read_bytes()
        try:
            read = cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            msg = f"{path} is no file of API keys: {where + ': ' if where else ''}{first['msg']}"
            raise ValueError(msg) from None
        if len({key.id for key in read.keys}) < len(read.keys):
            msg = f"{path} has two API keys of one id"
            raise ValueError(msg)
        return read

    def write(self, path: Path) -> None:
        """Replaces the file at once: a server reads the old one or the new one. Only its owner may read it."""
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        ordered = [{**key.model_dump(mode="json"), "scopes": sorted(key.scopes)} for key in self.keys]
        text = '{\n  "keys": [\n' + ",\n".join(f"    {orjson.dumps(each).decode()}" for each in ordered) + "\n  ]\n}\n"
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  # of Path none takes a mode
                file.write(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def new_key(name: str, scopes: Sequence[Scope], rate: float | None = None) -> tuple[Key, str]:
    """A key for the file, and what its caller sends: nobody can see that again."""
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    return Key(id=key_id, name=name, sha256=_hashed(secret), scopes=frozenset(scopes), rate=rate), f"{key_id}.{secret}"


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The keys that a server knows: none is asked for without a file, and a changed file is read again.

    Args:
        path: of the file; None for a server that is open to all.
        told: hears of each reading of a changed file whether it went well.
        monotonic: seconds.

    Raises:
        OSError, ValueError: if the file can't be used.
    """

    def __init__(
        self,
        path: Path | None,
        told: Callable[[bool], None] = lambda _: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._told = told
        self._monotonic = monotonic
        self._known: dict[str, Key] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._stamp: object = None
        self._look_at_s = 0.0
        if path is not None:
            self._stamp = _stamp(path)
            self._take(KeyFile.read(path))
            self._look_at_s = monotonic() + LOOK_S

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return self._path is None

    def admit(self, headers: Sequence[tuple[bytes, bytes]], scope: str) -> Key | None:
        """The key in a request's headers; None where the server is open.

        Raises:
            Problem: 401 without a key that is known, 403 without the scope, 429 beyond its rate.
        """
        if self._path is None:
            return None
        now_s = self._monotonic()
        if now_s >= self._look_at_s:
            self._look_at_s = now_s + LOOK_S
            self._look(self._path)
        key_id, _, secret = _sent(headers).partition(".")
        key = self._known.get(key_id)
        # Of an unknown id too: how long it takes says nothing of who there is.
        is_right = hmac.compare_digest(_hashed(secret), key.sha256 if key else "0" * 64)
        if key is None or not is_right:
            raise Problem(
                401,
                "Unauthorized",
                "send a key that this server knows, as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'",
                headers={"WWW-Authenticate": 'Bearer realm="headrace"'},
            )
        if scope not in key.scopes:
            has = ", ".join(sorted(key.scopes)) or "none"
            raise Problem(403, "Forbidden", f"key {key.id} lacks the scope {scope}; it has: {has}")
        if key.rate is not None:
            wait_s = self._buckets[key_id].take(key.rate, now_s)
            if wait_s > 0:
                after = str(math.ceil(wait_s))
                detail = f"key {key.id} may ask {key.rate:g} times a second"
                raise Problem(429, "Too many requests", detail, headers={"Retry-After": after})
        return key

    def _look(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._take(KeyFile.read(path))
        except (OSError, ValueError) as error:
            log.error(  # noqa: TRY400  # its text says it all, and a traceback could hold what was read
                "api_keys_unreadable", path=str(path), error=str(error), consequence="the keys read before stay valid"
            )
            self._told(False)  # a metric's value
        else:
            log.info("api_keys_read", path=str(path), keys=len(self._known))
            self._told(True)  # as above

    def _take(self, read: KeyFile) -> None:
        self._known = {key.id: key for key in read.keys}
        self._buckets = {key.id: self._buckets.get(key.id) or _Bucket() for key in read.keys}


class _Bucket:
    """Tokens that come at a rate, up to a second's worth; each request takes one."""

    __slots__ = ("_at_s", "_tokens")

    def __init__(self) -> None:
        self._tokens, self._at_s = math.inf, 0.0

    def take(self, rate: float, now_s: float) -> float:
        """Seconds until there will be a token; 0 if one was taken."""
        self._tokens = min(max(rate, 1.0), self._tokens + (now_s - self._at_s) * rate)
        self._at_s = now_s
        if self._tokens < 1:
            return (1 - self._tokens) / rate
        self._tokens -= 1
        return 0.0


def _stamp(path: Path) -> object:
    """What changes with a file; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _sent(headers: Sequence[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-api-key":
            return value.decode("latin-1").strip()
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else ""
    return ""
