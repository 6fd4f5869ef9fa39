"""Feast's offline store: training sets from the archive and Kafka, by the kernel that serves."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import click
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureView, FileSource, RepoConfig
from feast.data_format import DeltaFormat
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from feast.saved_dataset import SavedDatasetStorage
from pyarrow import dataset

from config.settings import Settings
from features.plan import Plan
from registry.plans import full_names_of, ordered_as_a_service, plan_of
from training.progress import shown
from training.run import Limits, TableLabels, interactions, schema_of, training_set

_NOTHING_TO_MATERIALIZE: Final = (
    "there is nothing to materialize: Headrace's rows are written by its stream (`headrace stream`), "
    "and old events are sent through it by `headrace replay FILE`"
)


class NotOfferedError(click.ClickException, NotImplementedError):
    """Something of Feast's that Headrace doesn't do: one line in Feast's command line, no traceback."""


class HeadraceOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store` in feature_store.yaml; the archive is where HEADRACE_ARCHIVE says.

    With `tail` set to false nothing is read from Kafka, and features know what is archived only.
    """

    type: Literal["registry.offline.HeadraceOfflineStore"] = "registry.offline.HeadraceOfflineStore"
    tail: bool = True


class HeadraceOfflineStore(OfflineStore):
    """Computes every feature for every row of `entity_df` as of its time: see `training.point_in_time`."""

    @staticmethod
    def get_historical_features(  # noqa: PLR0913, PLR0917  # Feast's signature
        config: RepoConfig,
        feature_views: list[FeatureView],  # noqa: ARG004  # Feast's signature; the plan knows the views
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        **_: Any,
    ) -> TrainingJob:
        """See `feast.FeatureStore.get_historical_features`; columns such as `item__price` override: see README.

        Without `entity_df` there is a row for every event of the time from `start_date` to `end_date` that names all
        entities that the features are about.
        """
        plan = plan_of(registry, project)
        names = ordered_as_a_service(plan, full_names_of(plan, feature_refs))
        if isinstance(entity_df, str):
            msg = (
                "entity_df is SQL, which Headrace has nothing to ask: give a DataFrame with a row for each label, of "
                "its entities' ids, its event_timestamp, and whatever else is to be kept"
            )
            raise NotOfferedError(msg)
        labels: Any = entity_df
        if entity_df is None:
            limits = Limits(start_ms=_ms(start_date), end_ms=_ms(end_date))
            settings = Settings(repo=Path(str(config.repo_path)))
            labels = interactions(settings, plan, names, limits, with_tail=config.offline_store.tail).to_pandas()
        return _historical(config, plan, names, labels, full=full_feature_names)

    @staticmethod
    def pull_latest_from_table_or_query(*_: Any, **__: Any) -> NoReturn:
        """Refused: Feast materializes through this."""
        raise NotOfferedError(_NOTHING_TO_MATERIALIZE)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,  # noqa: ARG004  # Feast's signature
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> TrainingJob:
        """Reads a file, such as one that a training set was persisted to."""
        if isinstance(data_source, FileSource) and isinstance(data_source.file_format, DeltaFormat):
            raise NotOfferedError(_NOTHING_TO_MATERIALIZE)  # An archive of events.
        if not isinstance(data_source, FileSource):
            msg = f"{type(data_source).__name__}: Headrace's offline store reads files (feast.FileSource)"
            raise NotOfferedError(msg)
        path, time = _path(config, data_source.path), dataset.field(timestamp_field)
        columns = [*dict.fromkeys([*join_key_columns, *feature_name_columns, timestamp_field])]

        def read() -> pa.Table:
            every = dataset.dataset(path)
            kind = every.schema.field(timestamp_field).type
            within = time.is_valid()
            if start_date is not None:
                within &= time >= pa.scalar(start_date).cast(kind)
            if end_date is not None:
                within &= time <= pa.scalar(end_date).cast(kind)
            return every.to_table(columns, filter=within)

        return TrainingJob(read, RetrievalMetadata(feature_name_columns, join_key_columns), config, full=True)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,  # noqa: ARG004  # Feast's signature; the table has its columns
        logging_config: LoggingConfig,
        registry: BaseRegistry,  # noqa: ARG004  # as above
    ) -> None:
        """Adds a file to the folder of what was served, which `feast validate` reads; it is not partitioned.

        Raises:
            NotOfferedError: if the destination is no folder of files.
        """
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            msg = f"{type(destination).__name__}: features are logged to files, by FileLoggingDestination(path=…)"
            raise NotOfferedError(msg)
        dataset.write_dataset(
            pq.read_table(data) if isinstance(data, Path) else data,
            _path(config, destination.path),
            basename_template=f"{uuid.uuid4().hex}-{{i}}.parquet",
            format="parquet",
            existing_data_behavior="overwrite_or_ignore",
        )


class TrainingJob(RetrievalJob):
    """A table that is made when it is asked for."""

    def __init__(
        self, make: Callable[[], pa.Table], metadata: RetrievalMetadata, config: RepoConfig, *, full: bool
    ) -> None:
        self._make, self._metadata, self._config, self._full = make, metadata, config, full

    @property
    def full_feature_names(self) -> bool:
        """Whether features are named with their views."""
        return self._full

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """None: cross features are computed with the others."""
        return []

    @property
    def metadata(self) -> RetrievalMetadata:
        """What was asked for."""
        return self._metadata

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the table to a Parquet file.

        Raises:
            NotOfferedError: if the storage is no file.
            FileExistsError: if there is one, unless it may be overwritten.
        """
        if not isinstance(storage, SavedDatasetFileStorage):
            msg = f"{type(storage).__name__}: training sets are persisted to files, by SavedDatasetFileStorage(path=…)"
            raise NotOfferedError(msg)
        path = _path(self._config, storage.file_options.uri)
        if path.exists() and not allow_overwrite:
            msg = f"{path} is there already: pass allow_overwrite=True, or another path"
            raise FileExistsError(msg)
        pq.write_table(self._to_arrow_internal(timeout), path)

    def to_df(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """As `to_arrow`; maps are dictionaries."""
        return _frame(self.to_arrow(*args, **kwargs))

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return _frame(self._to_arrow_internal(timeout))

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # Feast's signature
        return self._make()


def _historical(
    config: RepoConfig, plan: Plan, full_names: list[str], entity_df: pd.DataFrame, *, full: bool
) -> TrainingJob:
    time_column = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
    labels = pa.Table.from_pandas(entity_df, preserve_index=False).replace_schema_metadata()

    names = full_names if full else [plan.features[name].name for name in full_names]
    if taken := sorted(set(names) & set(labels.column_names)):
        msg = f"{', '.join(taken)}: a feature and a column of entity_df share the name: pass full_feature_names=True"
        raise ValueError(msg)

    def make() -> pa.Table:
        settings = Settings(repo=Path(str(config.repo_path)))
        schema = schema_of(plan, full_names, labels.schema)
        options: Any = {"time_column": time_column, "with_tail": config.offline_store.tail}
        with shown() as on_progress:
            given = (settings, plan, full_names, TableLabels(labels))
            table = pa.Table.from_batches(training_set(*given, **options, on_progress=on_progress), schema)
        return table.rename_columns([*labels.column_names, *names])

    keys = [name for name in labels.column_names if name != time_column]
    features = [name.replace("__", ":", 1) for name in full_names]
    times = entity_df[time_column]
    return TrainingJob(make, RetrievalMetadata(features, keys, times.min(), times.max()), config, full=full)


def _ms(date: datetime | None) -> int | None:
    """Epoch milliseconds of a date; without a zone it is UTC, as everywhere in Feast."""
    if date is None:
        return None
    return round((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() * 1000)


def _path(config: RepoConfig, uri: str) -> Path:
    """A file, by default in the project's folder."""
    return Path(str(config.repo_path)) / uri


def _frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(maps_as_pydicts="strict")
    return frame
