"""Feast's offline store: training sets from the archive and Kafka, by the kernel that serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn

import click
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureView, RepoConfig
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import infer_event_timestamp_from_entity_df
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel
from feast.saved_dataset import SavedDatasetStorage

from config.settings import Settings
from features.plan import Plan
from registry.plans import full_names_of, ordered_as_a_service, plan_of
from training.progress import shown
from training.run import TableLabels, schema_of, training_set


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
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],  # noqa: ARG004  # Feast's signature; the plan knows the views
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        **_: Any,
    ) -> HistoricalFeatures:
        """See `feast.FeatureStore.get_historical_features`; columns such as `item__price` override: see README."""
        if not isinstance(entity_df, pd.DataFrame):
            msg = (
                "get_historical_features needs entity_df, a DataFrame with a row for each label: its entities' ids, "
                "its event_timestamp, and whatever else is to be kept"
            )
            raise NotOfferedError(msg)
        plan = plan_of(registry, project)
        names = ordered_as_a_service(plan, full_names_of(plan, feature_refs))
        return HistoricalFeatures(config, plan, names, entity_df, full=full_feature_names)

    @staticmethod
    def pull_latest_from_table_or_query(*_: Any, **__: Any) -> NoReturn:
        """Refused: Feast materializes through this."""
        msg = (
            "there is nothing to materialize: Headrace's rows are written by its stream (`headrace stream`), "
            "and old events are sent through it by `headrace replay FILE`"
        )
        raise NotOfferedError(msg)

    pull_all_from_table_or_query = pull_latest_from_table_or_query


class HistoricalFeatures(RetrievalJob):
    """A training set that is made when it is asked for, with a progress bar where somebody looks."""

    def __init__(
        self, config: RepoConfig, plan: Plan, full_names: list[str], entity_df: pd.DataFrame, *, full: bool
    ) -> None:
        self._config, self._plan, self._full_names, self._full = config, plan, full_names, full
        self._time_column = infer_event_timestamp_from_entity_df(dict(entity_df.dtypes))
        self._labels = pa.Table.from_pandas(entity_df, preserve_index=False).replace_schema_metadata()

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
        times = self._labels[self._time_column].to_pandas()
        keys = [name for name in self._labels.column_names if name != self._time_column]
        return RetrievalMetadata([*self._full_names], keys, times.min(), times.max())

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Writes the training set to a Parquet file.

        Raises:
            NotOfferedError: if the storage is no file.
            FileExistsError: if there is one, unless it may be overwritten.
        """
        if not isinstance(storage, SavedDatasetFileStorage):
            msg = f"{type(storage).__name__}: training sets are persisted to files, by SavedDatasetFileStorage(path=…)"
            raise NotOfferedError(msg)
        path = Path(storage.file_options.uri)
        path = path if path.is_absolute() else Path(str(self._config.repo_path)) / path
        if path.exists() and not allow_overwrite:
            msg = f"{path} is there already: pass allow_overwrite=True, or another path"
            raise FileExistsError(msg)
        pq.write_table(self._to_arrow_internal(timeout), path)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # Feast's signature
        settings = Settings(repo=Path(str(self._config.repo_path)))
        schema = schema_of(self._plan, self._full_names, self._labels.schema)
        with shown() as on_progress:
            given = (settings, self._plan, self._full_names, TableLabels(self._labels))
            options: Any = {"time_column": self._time_column, "with_tail": self._config.offline_store.tail}
            batches = list(training_set(*given, **options, on_progress=on_progress))
        table = pa.Table.from_batches(batches, schema)
        if self._full:
            return table
        names = [self._plan.features[name].name for name in self._full_names]
        return table.rename_columns([*self._labels.column_names, *names])

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return _frame(self._to_arrow_internal(timeout))

    def to_df(self, *args: Any, **kwargs: Any) -> pd.DataFrame:
        """As `to_arrow`; maps are dictionaries."""
        return _frame(self.to_arrow(*args, **kwargs))


def _frame(table: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(maps_as_pydicts="strict")
    return frame
