"""How every loop of ours is compiled: by numba, once for all machines of an architecture, kept beside its source."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from enum import EnumType
from types import FunctionType
from typing import Any, Final, TypeVar, cast

import numpy as np
from numba import config, njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator, UserProvidedCacheLocator
from numba.core.registry import CPUDispatcher

# An image is built on one machine and runs on others. For the processor at hand alone, loops were no faster.
os.environ.setdefault("NUMBA_CPU_NAME", "x86-64-v2" if platform.machine() == "x86_64" else "generic")
os.environ.setdefault("NUMBA_CPU_FEATURES", "")
config.reload_config()  # type: ignore[no-untyped-call]  # numba has few types


_USED: Final = (CPUDispatcher, EnumType, int, float, np.generic)
Loop = TypeVar("Loop", bound=Callable[..., Any])


class _Stamped:
    """Compiled code is as old as all that went into it: its file, and the loops and constants of others that it uses.

    To numba it is as old as its file.
    """

    def __init__(self, py_func: FunctionType, py_file: str) -> None:
        super().__init__(py_func, py_file)  # type: ignore[call-arg]  # numba's class comes after this one
        names = (py_func.__globals__.get(name) for name in py_func.__code__.co_names)
        self._used = [_stamp(used) for used in names if isinstance(used, _USED)]

    def get_source_stamp(self) -> object:
        return super().get_source_stamp(), self._used  # type: ignore[misc]  # as above

    def ensure_cache_path(self) -> None:
        # Where nobody may write, as in an image, what is there serves.
        with suppress(OSError):
            super().ensure_cache_path()  # type: ignore[misc]  # as above


class _Named(_Stamped, UserProvidedCacheLocator):
    """In the folder that NUMBA_CACHE_DIR names."""


class _Beside(_Stamped, InTreeCacheLocator):
    """In `__pycache__` beside the source."""


class _Found(CompileResultCacheImpl):
    _locator_classes: Any = (_Named, _Beside)


class _Cache(FunctionCache):
    _impl_class = _Found

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]  # as above


def compiled(loop: Loop) -> Loop:
    """The loop, compiled for whatever arguments it meets; it lets other threads run, and divides by 0 as numpy does."""
    made: Any = njit(nogil=True, error_model="numpy")(loop)
    made._cache = _Cache(loop)  # type: ignore[no-untyped-call]  # as above
    return cast("Loop", made)


def _stamp(used: Any) -> object:
    if isinstance(used, CPUDispatcher):
        return cast("Any", used)._cache._impl.locator.get_source_stamp()
    return repr(list(used) if isinstance(used, EnumType) else used)
