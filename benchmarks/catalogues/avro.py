"""As `plain`, in Avro by a schema registry."""

from pydantic import Field

from benchmarks.catalogues import declare
from headrace import Event


class _Fields(Event, topic="avro"):
    """What all three have."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Impression(_Fields, topic="avro.impressions", format="avro"):
    """An item was shown to a user."""


class Click(_Fields, topic="avro.clicks", format="avro"):
    """A user opened an item."""


class Like(_Fields, topic="avro.likes", format="avro"):
    """A user marked an item as liked."""


globals().update(declare(10, 2, (Click, Impression, Like)))
