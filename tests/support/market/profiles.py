"""What others compute: profiles from files, what is pushed."""

from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import (
    Array,
    Bool,
    Bytes,
    Decimal,
    FeastType,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    Map,
    String,
    UnixTimestamp,
    Uuid,
)

from headrace.feast import projection
from tests.support.market import UserActs


def file(name: str, path: str) -> FileSource:
    """A Parquet file in the project's folder."""
    return FileSource(
        name=name,
        path=f"data/{path}.parquet",
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )


user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)

user_profile = FeatureView(
    name="user_profile",
    entities=[user],
    ttl=timedelta(days=365),
    schema=[Field(name="age", dtype=Int64), Field(name="favourites", dtype=Array(String))],
    source=file("users", "users"),
)
item_profile = FeatureView(
    name="item_profile",
    entities=[item],
    schema=[Field(name="price", dtype=Float64), Field(name="category", dtype=String), Field(name="made", dtype=Int32)],
    source=file("items", "items"),
)
stock = FeatureView(
    name="stock",
    entities=[item],
    ttl=timedelta(hours=2),
    schema=[Field(name="left", dtype=Int64)],
    source=PushSource(name="stock_pushed", batch_source=file("stocks", "stock")),
)
pair = FeatureView(
    name="pair",
    entities=[user, item],
    schema=[Field(name="score", dtype=Float32)],
    source=PushSource(name="pairs", batch_source=file("pair_rows", "pairs")),
)
trips = FeatureView(
    name="trips",
    entities=[driver],
    schema=[Field(name="n", dtype=Int64)],
    source=PushSource(name="trip_rows", batch_source=file("all_trips", "trips")),
)
today = FeatureView(
    name="today",
    entities=[],
    schema=[Field(name="rate", dtype=Float64)],
    source=PushSource(name="days", batch_source=file("all_days", "days")),
)
TYPES: dict[str, FeastType] = {
    "int32": Int32,
    "int64": Int64,
    "float32": Float32,
    "float64": Float64,
    "bool": Bool,
    "text": String,
    "raw": Bytes,
    "at": UnixTimestamp,
    "ints": Array(Int64),
    "numbers": Array(Float64),
    "singles": Array(Float32),
    "texts": Array(String),
    "bools": Array(Bool),
    "raws": Array(Bytes),
    "times": Array(UnixTimestamp),
    "map": Map,
    "maps": Array(Map),
    "json": Json,
    "uuid": Uuid,
    "decimal": Decimal,
}
kinds = FeatureView(
    name="kinds",
    entities=[item],
    schema=[Field(name=name, dtype=dtype) for name, dtype in TYPES.items()],
    source=PushSource(name="kind_rows", batch_source=file("all_kinds", "kinds")),
)
cart = RequestSource(name="cart", schema=[Field(name="budget", dtype=Float64)])


@on_demand_feature_view(sources=[item_profile, cart], schema=[Field(name="affordable", dtype=Float64)])
def budgeted(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"affordable": inputs["budget"] / inputs["price"]})


@on_demand_feature_view(
    sources=[projection(UserActs, "clicks_24h"), cart], schema=[Field(name="a_click", dtype=Float64)]
)
def spending(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"a_click": inputs["budget"] / inputs["clicks_24h"]})


ordinary_v1 = FeatureService(
    name="ordinary_v1",
    features=[
        user_profile,
        item_profile[["price"]],
        stock,
        budgeted,
    ],
)
