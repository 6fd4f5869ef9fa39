"""Headrace: declare a feature once; it is computed on the stream, kept in Redis, registered in Feast and served."""

from headrace._own import check_packages

check_packages()

from features import agg  # noqa: E402  # only after the check that this `features` is ours
from features.events import Event  # noqa: E402  # as above
from features.expressions import col  # noqa: E402  # as above
from features.language import DeclarationError, Entity, cross, derived, service, view  # noqa: E402  # as above

__all__ = ["DeclarationError", "Entity", "Event", "agg", "col", "cross", "derived", "service", "view"]
