"""Contracts as ours are: the base of `nested` and `avro`."""

from pydantic import Field

from benchmarks.catalogues import declare
from headrace import Event


class _Fields(Event, topic="plain"):
    """What all three have."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Impression(_Fields, topic="plain.impressions"):
    """An item was shown to a user."""


class Click(_Fields, topic="plain.clicks"):
    """A user opened an item."""


class Like(_Fields, topic="plain.likes"):
    """A user marked an item as liked."""


globals().update(declare(10, 2, (Click, Impression, Like)))
