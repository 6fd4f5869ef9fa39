"""Headrace's packages have plain names; this says so when another `features` or `store` is found in their place."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PACKAGES = ("config", "features", "store", "registry", "streams", "serving")


def check_packages() -> None:
    """Checks that Headrace's packages are found where this one is.

    Raises:
        ImportError: if another package of that name comes first on the path; it names both.
    """
    home = Path(__file__).resolve().parent.parent
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(str(spec.origin)).resolve().parent if spec and spec.origin else None
        if found != home / name:
            msg = (
                f"Headrace needs its own package {name!r} at {home / name}, but Python finds {found or 'none'} first; "
                "rename yours, move it into a package, or put Headrace's folder first on sys.path"
            )
            raise ImportError(msg)
