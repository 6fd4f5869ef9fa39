"""For who uses Headrace by Feast's SDK, or declares views in Feast's words."""

from registry.compile import projection
from registry.online import as_of

__all__ = ["as_of", "projection"]
