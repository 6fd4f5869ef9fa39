"""Feast's answer over what was read, made only in the form that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import DoubleList, Int64List, StringList, Value
from feast.type_map import feast_value_type_to_python_type
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]  # it brings no types

from registry.given import maker_of
from store.reader import Response

_EPOCH: Final = datetime.fromtimestamp(0, UTC)


class Feature:
    """A feature of an answer: what it is called, and where it was read."""

    def __init__(self, name: str, read: Response, at: int) -> None:
        self.name, self.read, self.at = name, read, at
        self._given = read.raw(at)

    @cached_property
    def values(self) -> list[Any]:
        """As Feast's SDK has them, one a row."""
        if self._given is None:
            return self.read.values(self.at)
        return list(map(feast_value_type_to_python_type, self.protos))

    @cached_property
    def protos(self) -> list[Value]:
        """As Feast's protobuf has them."""
        if self._given is None:
            return list(map(_to_proto, self.read.values(self.at)))
        dtype, raw = self._given
        return list(map(maker_of(dtype), raw))

    def arrow(self) -> pa.Array:
        """As Arrow has them: of a feature's own type, or of what Feast finds in given ones."""
        return self.read.arrow(self.at) if self._given is None else pa.array(self.values)

    @property
    def event_us(self) -> list[int]:
        """The time of each row's last event, microseconds; -1 for none."""
        found: list[int] = self.read.event_us(self.at).tolist()
        return found

    def vector(self) -> Any:
        """Feast's protobuf of values, statuses and times."""
        statuses = list(map(FieldStatus.Value, self.read.statuses(self.at)))
        vector = GetOnlineFeaturesResponse.FeatureVector(values=self.protos, statuses=statuses)
        for us in self.event_us:
            vector.event_timestamps.add().FromMicroseconds(max(us, 0))
        return vector


class _Computed(NamedTuple):
    """As `Feature`, of what Feast has computed."""

    name: str
    made: Any

    @property
    def values(self) -> list[Any]:
        return list(map(feast_value_type_to_python_type, self.made.values))

    def arrow(self) -> pa.Array:
        return pa.array(self.values)

    @property
    def event_us(self) -> list[int]:
        return [at.ToMicroseconds() for at in self.made.event_timestamps]

    def vector(self) -> Any:
        return self.made


def features_of(read: Response, names: Sequence[str]) -> list[Feature]:
    """All features that were read, by these names."""
    return [Feature(name, read, at) for at, name in enumerate(names)]


class LazyResponse(OnlineResponse):
    """Feast's answer, built only in the form that is asked for: its protobuf alone takes longer than the read."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], features: Sequence[Feature | _Computed]) -> None:
        self._columns, self._features = columns, features
        self._feature_types = {}

    def joined(self, other: OnlineResponse) -> LazyResponse:
        """This answer, and what another has besides."""
        known = {*self._columns, *(each.name for each in self._features)}
        named = zip(other.proto.metadata.feature_names.val, other.proto.results, strict=True)
        more = [_Computed(name, made) for name, made in named if name not in known]
        return LazyResponse(self._columns, [*self._features, *more])

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, list[Any]]:
        """Entity keys and features by name, a list each."""
        answer = {name: list(values) for name, values in self._columns.items()}
        answer |= {each.name: each.values for each in self._features}
        if not include_event_timestamps:
            return answer
        for name, values in self._columns.items():  # As in Feast, that they have none.
            answer[name + TIMESTAMP_POSTFIX] = [0] * len(values)
        for each in self._features:
            answer[each.name + TIMESTAMP_POSTFIX] = [max(us, 0) // 1_000_000 for us in each.event_us]
        return answer

    def to_df(self, include_event_timestamps: bool = False) -> pd.DataFrame:
        """As `to_dict`, a column each."""
        return pd.DataFrame(self.to_dict(include_event_timestamps))

    def to_arrow(self, include_event_timestamps: bool = False) -> pa.Table:
        """As `to_dict`, a column each, of the feature's own type."""
        columns: dict[str, Any] = {name: _ids(values) for name, values in self._columns.items()}
        for each in self._features:
            columns[each.name] = each.arrow()
            if include_event_timestamps:
                columns[each.name + TIMESTAMP_POSTFIX] = pa.array(np.maximum(each.event_us, 0) // 1_000_000)
        return pa.table(columns)

    @property
    def proto(self) -> GetOnlineFeaturesResponse:  # type: ignore[override]  # an attribute in Feast, built eagerly
        """Feast's protobuf."""
        answer = GetOnlineFeaturesResponse()
        for name, values in self._columns.items():
            answer.metadata.feature_names.val.append(name)
            protos = [Value(string_val=str(value)) if value is not None else Value() for value in values]
            times = [Timestamp()] * len(protos)
            answer.results.add(values=protos, statuses=[FieldStatus.PRESENT] * len(protos), event_timestamps=times)
        for each in self._features:
            answer.metadata.feature_names.val.append(each.name)
            answer.results.append(each.vector())
        return answer

    def by_row(self) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One (time of the last event, values by feature name) a row; (None, None) for an entity never seen."""
        features = [each for each in self._features if isinstance(each, Feature)]
        found: list[tuple[datetime | None, dict[str, Value] | None]] = []
        for row, us in enumerate(features[0].event_us):
            values = {each.name: each.protos[row] for each in features}
            found.append((_EPOCH + timedelta(microseconds=us), values) if us >= 0 else (None, None))
        return found


def _to_proto(value: Any) -> Value:  # noqa: PLR0911  # a list of cases, one a type
    match value:
        case None:
            return Value()
        case bool():
            return Value(bool_val=value)
        case int():
            return Value(int64_val=value)
        case float():
            return Value(double_val=value)
        case str():
            return Value(string_val=value)
        case [int(), *_]:
            return Value(int64_list_val=Int64List(val=value))
        case list() if any(isinstance(each, float) for each in value):
            return Value(double_list_val=DoubleList(val=[float("nan") if each is None else each for each in value]))
        case list():
            # Feast has no null in a list. Of numbers alone that are all null it can't tell that they are numbers.
            return Value(string_list_val=StringList(val=["" if each is None else each for each in value]))
        case _:
            proto = Value()
            proto.map_val.SetInParent()
            for key, number in value.items():
                proto.map_val.val[key].double_val = number
            return proto


def _ids(values: Sequence[Any]) -> pa.Array:
    """Ids as they are; as texts, if they are of several types."""
    kinds = {type(value) for value in values if value is not None}
    return pa.array(values if len(kinds) < 2 else [None if value is None else str(value) for value in values])
