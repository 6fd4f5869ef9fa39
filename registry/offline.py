"""Feast's offline store: training sets from the archive and Kafka, by the kernel that serves."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import click
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore, FeatureView, FileSource, RepoConfig
from feast.data_format import DeltaFormat
from feast.data_source import DataSource
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.infra.offline_stores.dask import DaskOfflineStore, DaskOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from feast.saved_dataset import SavedDatasetStorage
from pyarrow import dataset

from config.settings import Settings
from features.plan import Given, Plan
from features.program import GivenView, Program
from registry.given import pack_columns, plan_with
from registry.plans import full_names_of, ordered_as_a_service
from training.progress import shown
from training.run import Labels, Limits, TableLabels, interactions, schema_of, training_set

_TIME: Final = "event_timestamp"
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
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        **_: Any,
    ) -> RetrievalJob:
        """See `feast.FeatureStore.get_historical_features`; columns such as `item__price` override: see README.

        Without `entity_df` there is a row for every event of the time from `start_date` to `end_date` that names all
        entities that the features are about.
        """
        plan = plan_with(registry, project)
        computed = [
            each
            for each in OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
            if each.name not in {view.name for view in plan.views}
        ]
        names = _with_sources(plan, feature_refs, computed)
        if all(isinstance(plan.features[name].spec, Given) for name in names):
            of_files = (
                _of_files(config),
                feature_views,
                feature_refs,
                entity_df,
                registry,
                project,
                full_feature_names,
            )
            return DaskOfflineStore.get_historical_features(*of_files, start_date=start_date, end_date=end_date)
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
        join = Join(config, registry, project)
        return _historical(config, plan, names, labels, join, computed, full=full_feature_names)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig, data_source: DataSource, *given: Any, **more: Any
    ) -> RetrievalJob:
        """The newest rows of a file, by which Feast materializes an ordinary view."""
        _must_be_a_file(data_source)
        return DaskOfflineStore.pull_latest_from_table_or_query(_of_files(config), data_source, *given, **more)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig, data_source: DataSource, *given: Any, **more: Any
    ) -> RetrievalJob:
        """All rows of a file, such as one that a training set was persisted to."""
        _must_be_a_file(data_source)
        job = DaskOfflineStore.pull_all_from_table_or_query(_of_files(config), data_source, *given, **more)
        metadata = RetrievalMetadata(more["feature_name_columns"], more["join_key_columns"])
        return TrainingJob(partial(_quietly, job.to_arrow), metadata, config, [], full=True)

    @staticmethod
    def offline_write_batch(config: RepoConfig, *given: Any, **more: Any) -> None:
        """Adds rows to the file of an ordinary view: `store.push(…, to=PushMode.ONLINE_AND_OFFLINE)`."""
        DaskOfflineStore.offline_write_batch(_of_files(config), *given, **more)

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


def _quietly(read: Callable[[], pa.Table]) -> pa.Table:
    """What Feast reads of files; how it does with pandas nobody here can change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return read()


def _must_be_a_file(source: DataSource) -> None:
    if isinstance(source, FileSource) and isinstance(source.file_format, DeltaFormat):
        raise NotOfferedError(_NOTHING_TO_MATERIALIZE)  # An archive of events.
    if not isinstance(source, FileSource):
        msg = f"{type(source).__name__}: Headrace's offline store reads files (feast.FileSource)"
        raise NotOfferedError(msg)


def _of_files(config: RepoConfig) -> RepoConfig:
    """The project as it would be with Feast's own store of files, which reads and joins ordinary views."""
    other: Any = copy(config)
    other._offline_store = DaskOfflineStoreConfig()
    return other  # type: ignore[no-any-return]  # a copy of one


def _with_sources(plan: Plan, references: list[str], computed: Sequence[OnDemandFeatureView]) -> list[str]:
    """Full names of all that is asked for, and that on-demand views of users take from."""
    theirs = {each.name for each in computed}
    mine = [each for each in references if each.partition(":")[0] not in theirs]
    taken = [
        f"{projection.name}:{field.name}"
        for view in computed
        for projection in view.source_feature_view_projections.values()
        for field in projection.features
    ]
    names = ordered_as_a_service(plan, full_names_of(plan, mine))
    return list(dict.fromkeys([*names, *full_names_of(plan, taken)]))


class TrainingJob(RetrievalJob):
    """A table that is made when it is asked for."""

    def __init__(
        self,
        make: Callable[[], pa.Table],
        metadata: RetrievalMetadata,
        config: RepoConfig,
        computed: list[OnDemandFeatureView],
        *,
        full: bool,
    ) -> None:
        self._make, self._metadata, self._config, self._computed, self._full = make, metadata, config, computed, full

    @property
    def full_feature_names(self) -> bool:
        """Whether features are named with their views."""
        return self._full

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Those of users, which Feast computes: cross features are computed with the others."""
        return self._computed

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
    config: RepoConfig,
    plan: Plan,
    full_names: list[str],
    entity_df: pd.DataFrame,
    join: Join,
    computed: list[OnDemandFeatureView],
    *,
    full: bool,
) -> TrainingJob:
    time_column = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
    labels = pa.Table.from_pandas(entity_df, preserve_index=False).replace_schema_metadata()
    names = full_names if full else [plan.features[name].name for name in full_names]
    if taken := sorted(set(names) & set(labels.column_names)):
        msg = f"{', '.join(taken)}: a feature and a column of entity_df share the name: pass full_feature_names=True"
        raise ValueError(msg)
    ours = [name for name in full_names if not isinstance(plan.features[name].spec, Given)]

    def make() -> pa.Table:
        settings = Settings(repo=Path(str(config.repo_path)))
        program = Program(plan, ours)
        rows, columns = join.of(plan, entity_df, time_column, set(full_names) - set(ours), program.given)
        given = labels
        for name, column in rows.items():
            given = given.append_column(name, column)
        options: Any = {"time_column": time_column, "with_tail": config.offline_store.tail}
        with shown() as on_progress:
            every = training_set(settings, plan, ours, TableLabels(given), **options, on_progress=on_progress)
            table = pa.Table.from_batches(every, schema_of(plan, ours, labels.schema))
        for name, column in columns.items():
            table = table.append_column(name, column)
        return table.select([*labels.column_names, *full_names]).rename_columns([*labels.column_names, *names])

    keys = [name for name in labels.column_names if name != time_column]
    features = [name.replace("__", ":", 1) for name in full_names]
    times = entity_df[time_column]
    return TrainingJob(make, RetrievalMetadata(features, keys, times.min(), times.max()), config, computed, full=full)


def with_rows(settings: Settings, plan: Plan, full_names: Sequence[str], labels: Labels, time_column: str) -> Labels:
    """Labels with the rows of ordinary views that features need, as `training.point_in_time` takes them."""
    given = Program(plan, full_names).given
    if not given:
        return labels
    store = FeatureStore(str(settings.repo))
    table = pa.Table.from_batches(labels.chunks(), labels.schema)
    join = Join(store.config, store.registry, store.project)
    rows, _ = join.of(plan, table.to_pandas(), time_column, (), given)
    for name, column in rows.items():
        table = table.append_column(name, column)
    return TableLabels(table)


@dataclass(frozen=True)
class Join:
    """Feast's point-in-time join of ordinary views."""

    config: RepoConfig
    registry: BaseRegistry
    project: str

    def of(
        self,
        plan: Plan,
        labels: pd.DataFrame,
        time_column: str,
        full_names: Collection[str],
        needed: Collection[GivenView],
    ) -> tuple[dict[str, pa.Array], dict[str, pa.Array]]:
        """By name, rows of views that others need, as `training.point_in_time` takes them, and columns of features."""
        rows: dict[str, pa.Array] = {}
        columns: dict[str, pa.Array] = {}
        packed = {view.view: view for view in needed}
        for name in dict.fromkeys([*packed, *(plan.features[each].view for each in full_names)]):
            view = self.registry.get_feature_view(name, self.project)
            joined = self._joined(view, labels, time_column)
            if name in packed:
                objects: Any = joined.astype(object)
                objects = objects.where(joined.notna(), None)
                columns_of = {field.name: objects[field.name].tolist() for field in view.features}
                rows[packed[name].name] = pa.array(list(pack_columns(view, columns_of)), pa.binary())
            own = (plan.features[each] for each in full_names if plan.features[each].view == name)
            columns |= {each.full_name: pa.Array.from_pandas(joined[each.name]) for each in own}
        return rows, columns

    def _joined(self, view: FeatureView, labels: pd.DataFrame, time_column: str) -> pd.DataFrame:
        """All features of a view, a row for each label."""
        keys = [*view.join_keys, time_column]
        asked = labels[keys].rename(columns={time_column: _TIME})
        asked[_TIME] = pd.to_datetime(asked[_TIME], utc=True)
        # Feast gives an entity at a time once, and sorts by time.
        references = [f"{view.name}:{field.name}" for field in view.features]
        given = (_of_files(self.config), [view], references, asked.drop_duplicates(), self.registry, self.project)
        found = DaskOfflineStore.get_historical_features(*given).to_df()
        return asked.merge(found, how="left", on=[*view.join_keys, _TIME])


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
