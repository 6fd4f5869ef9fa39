"""As `plain`, with one field that is called otherwise and lies deeper."""

from pydantic import AliasPath, Field

from benchmarks.catalogues import declare
from headrace import Event


class _Fields(Event, topic="nested"):
    """What all three have."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0, validation_alias=AliasPath("product", "amount"))
    surface: str | None = None


class Impression(_Fields, topic="nested.impressions"):
    """An item was shown to a user."""


class Click(_Fields, topic="nested.clicks"):
    """A user opened an item."""


class Like(_Fields, topic="nested.likes"):
    """A user marked an item as liked."""


globals().update(declare(10, 2, (Click, Impression, Like)))
