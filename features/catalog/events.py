"""What producers send: one contract a topic, keyed by user in Kafka."""

from pydantic import Field

from headrace import Event, col, share, share_null

_EXPECTED = [share_null("category") < 0.05, share_null("price") < 0.05, share(col("price") > 10_000) < 0.001]


class Impression(Event, topic="impressions", expect=_EXPECTED):
    """An item was shown to a user."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Click(Event, topic="clicks", expect=_EXPECTED):
    """A user opened an item."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None


class Like(Event, topic="likes", expect=_EXPECTED):
    """A user marked an item as liked."""

    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    brand: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None
