"""What others compute of users and items, in Feast's own words: `apply` registers it with the rest.

Files are written by whatever runs every night and materialized (`feast materialize-incremental`); stock is pushed as it
changes (`store.push("stock", frame)`). Services and derived features take it by name: `given("item_profile:price")`.
Only `apply` and its like import this module, as it imports Feast.
"""

from __future__ import annotations

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Array, Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)


def _file(name: str) -> FileSource:
    return FileSource(name=f"{name}_file", path=f"data/{name}.parquet", timestamp_field="event_timestamp")


user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="country", dtype=String, description="Where the user lives"),
        Field(name="joined_days", dtype=Int64, description="Days since the user signed up"),
        Field(name="brands", dtype=Array(String), description="Brands that the user follows"),
    ],
    source=_file("user_profile"),
    description="What users have said of themselves",
    owner="accounts",
)
item_profile = FeatureView(
    name="item_profile",
    entities=[item],
    schema=[
        Field(name="item_id", dtype=String),
        Field(name="category", dtype=String, description="Category in the shop's catalogue"),
        Field(name="price", dtype=Float64, description="Price in the shop's catalogue"),
        Field(name="brand", dtype=String, description="Who made it"),
    ],
    source=_file("item_profile"),
    description="What the shop's catalogue says of items",
    owner="marketplace",
)
stock = FeatureView(
    name="stock",
    entities=[item],
    ttl=timedelta(days=1),
    schema=[Field(name="item_id", dtype=String), Field(name="left", dtype=Int64, description="Pieces that are left")],
    source=PushSource(name="stock", batch_source=_file("stock")),
    description="How many of an item are left, as the warehouse says",
    owner="warehouse",
)
