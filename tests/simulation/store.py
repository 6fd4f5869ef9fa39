"""A simulated Redis: as much of it as the stream uses, in one dictionary, with the real `store/commit.lua`.

`tests/simulation/test_conformance.py` holds it to a real Redis, command by command.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lupa import lua51  # type: ignore[import-untyped]  # fakeredis brings it; its stubs are not worth a package
from redis.exceptions import NoScriptError, ResponseError

Command = tuple[Any, ...]
Value = bytes | tuple[bytes, ...]
"""A text, or a list."""
Values = Mapping[bytes, tuple[Value, int | None]]
"""Values and when they expire, ms since the epoch, by key."""

_LUA: Final = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
_COMPILED: Final[dict[bytes, Any]] = {}


class SimulatedRedis:
    """Keys and values, one command after the other.

    Args:
        clock_ms: the time by which keys expire, ms since the epoch.
    """

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._values: dict[bytes, tuple[Value, int | None]] = {}
        self._scripts: dict[bytes, bytes] = {}

    def execute(self, command: Command) -> Any:
        """The answer to a command, as redis-py gives it; an error is returned, not raised."""
        name, *arguments = command
        try:
            return getattr(self, f"_{name.lower()}")(*map(_bytes, arguments))
        except ResponseError as error:
            return error

    def snapshot(self) -> Values:
        """All that is there now."""
        now_ms = self._clock_ms()
        return {key: each for key, each in self._values.items() if each[1] is None or each[1] > now_ms}

    def restart(self, values: Values) -> None:
        """Comes back with these values and without scripts."""
        self._values = dict(values)
        self._scripts = {}

    def _get(self, key: bytes) -> Any:
        found = self._values.get(key)
        if found is None:
            return None
        value, expire_at_ms = found
        if expire_at_ms is not None and expire_at_ms <= self._clock_ms():
            del self._values[key]
            return None
        return value

    def _mget(self, *keys: bytes) -> list[bytes | None]:
        return [self._get(key) for key in keys]

    def _set(self, key: bytes, value: bytes, *options: bytes) -> bool | None:
        how = list(options)
        if b"NX" in how:
            how.remove(b"NX")
            if self._get(key) is not None:
                return None
        expire_at_ms = int(how[1]) if how[:1] == [b"PXAT"] else None
        self._values[key] = value, expire_at_ms
        return True

    def _rpush(self, key: bytes, *values: bytes) -> int:
        self._values[key] = (*(self._get(key) or ()), *values), None
        return len(self._values[key][0])

    def _lrange(self, key: bytes, first: bytes, last: bytes) -> list[bytes]:
        assert int(first) >= 0
        assert last == b"-1"
        return list((self._get(key) or ())[int(first) :])

    def _llen(self, key: bytes) -> int:
        return len(self._get(key) or ())

    def _del(self, *keys: bytes) -> int:
        found = [key for key in dict.fromkeys(keys) if self._get(key) is not None]
        for key in found:
            del self._values[key]
        return len(found)

    def _script(self, subcommand: bytes, text: bytes = b"") -> Any:
        if subcommand == b"FLUSH":
            self._scripts = {}
            return True
        sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self._scripts[sha.encode()] = text
        return sha

    def _evalsha(self, sha: bytes, n_keys: bytes, *arguments: bytes) -> Any:
        text = self._scripts.get(sha)
        if text is None:
            msg = "No matching script. Please use EVAL."
            raise NoScriptError(msg)
        script = _COMPILED.get(text)
        if script is None:
            whole = b"return function(call, KEYS, ARGV) local redis = {call = call}\n" + text + b"\nend"
            script = _COMPILED[text] = _LUA.execute(whole)
        keys, rest = arguments[: int(n_keys)], arguments[int(n_keys) :]
        return script(self._call, _LUA.table_from(keys), _LUA.table_from(rest))

    def _call(self, name: bytes, *arguments: bytes) -> Any:
        """`redis.call` of a script: nil is false there."""
        answer = self.execute((name.decode(), *arguments))
        if isinstance(answer, Exception):
            raise answer
        return False if answer is None else answer


class Client:
    """redis-py's client, as far as the stream uses it.

    Args:
        roundtrip: sends commands and returns their answers; what goes wrong on the way is up to it.
    """

    def __init__(self, roundtrip: Callable[[Sequence[Command]], list[Any]]) -> None:
        self._roundtrip = roundtrip

    def get(self, key: bytes) -> Any:
        return self._one("GET", key)

    def mget(self, keys: Sequence[bytes]) -> Any:
        return self._one("MGET", *keys)

    def execute_command(self, *words: Any) -> Any:
        return self._one(*words)

    def script_load(self, script: str) -> Any:
        return self._one("SCRIPT", "LOAD", script)

    def pipeline(self, *, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self._roundtrip)

    def _one(self, *command: Any) -> Any:
        (answer,) = self._roundtrip([command])
        if isinstance(answer, Exception):
            raise answer
        return answer


class Pipeline:
    """Commands that are sent together, each for itself."""

    def __init__(self, roundtrip: Callable[[Sequence[Command]], list[Any]]) -> None:
        self._roundtrip = roundtrip
        self._commands: list[Command] = []

    def execute_command(self, *command: Any) -> None:
        self._commands.append(command)

    def execute(self, *, raise_on_error: bool = True) -> list[Any]:
        answers = self._roundtrip(self._commands) if self._commands else []
        for answer in answers:
            if raise_on_error and isinstance(answer, Exception):
                raise answer
        return answers


def _bytes(argument: Any) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()
