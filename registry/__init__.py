"""Feast: the plan compiled to its registry, and its stores in front of ours.

What must be so before Feast is imported is here, as this is imported before any module that does.
"""

import os
from typing import Any

# Feast's import would switch every metric of the process to files, for workers of its own server.
import prometheus_client as prometheus_client
import typeguard

_typechecked: Any = typeguard.typechecked


def _typechecked_but_feast(target: Any = None, **options: Any) -> Any:
    """Leaves Feast's classes as they are: to compile them again, with checks, is 3 of the 5 s that its import takes."""
    if str(getattr(target, "__module__", "")).startswith("feast."):
        return target
    return _typechecked(target, **options)


typeguard.typechecked = _typechecked_but_feast

# For its own server's metrics Feast makes a temporary folder, which it leaves behind, and names it to all children of
# the process; unless it is told of one.
_FOLDERS = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")
_before = {name: os.environ.get(name) for name in _FOLDERS}
os.environ.update(dict.fromkeys(_FOLDERS, os.devnull))
import feast.metrics  # noqa: E402, F401  # once it is told

for _name, _value in _before.items():
    if _value is None:
        del os.environ[_name]
    else:
        os.environ[_name] = _value
