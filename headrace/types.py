"""Types for derived features."""

from features.types import Array, BoolArray

__all__ = ["Array", "BoolArray"]
