"""Headrace: declare a feature once; it is computed on the stream, kept in Redis, registered in Feast and served."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from headrace._own import check_packages

check_packages()

if TYPE_CHECKING:
    from features import agg as agg
    from features import source as source
    from features.events import Event as Event
    from features.expectations import rate as rate
    from features.expectations import share as share
    from features.expectations import share_null as share_null
    from features.expressions import col as col
    from features.language import DeclarationError as DeclarationError
    from features.language import Entity as Entity
    from features.language import cross as cross
    from features.language import derived as derived
    from features.language import service as service
    from features.language import view as view

_HOMES = {
    "agg": "features.agg",
    "source": "features.source",
    "Event": "features.events",
    "col": "features.expressions",
    **dict.fromkeys(("rate", "share", "share_null"), "features.expectations"),
    **dict.fromkeys(("DeclarationError", "Entity", "cross", "derived", "service", "view"), "features.language"),
}

__all__ = [
    "DeclarationError",
    "Entity",
    "Event",
    "agg",
    "col",
    "cross",
    "derived",
    "rate",
    "service",
    "share",
    "share_null",
    "source",
    "view",
]


def __getattr__(name: str) -> Any:
    """Names of the language, imported when first asked for: the command line, which is in this package, needs none."""
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    home = import_module(_HOMES[name])
    return home if name in ("agg", "source") else getattr(home, name)
