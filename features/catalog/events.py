"""What producers send: one contract a topic, keyed by user in Kafka."""

from pydantic import Field

from headrace import Event


class Impression(Event, topic="impressions"):
    """An item was shown to a user."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Click(Event, topic="clicks"):
    """A user opened an item."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Like(Event, topic="likes"):
    """A user marked an item as liked."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None
