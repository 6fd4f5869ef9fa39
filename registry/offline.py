"""Feast's offline store, until there is one: each of its paths says what to do instead."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import click
from feast.infra.offline_stores.offline_store import OfflineStore
from feast.repo_config import FeastConfigBaseModel


class NotOfferedError(click.ClickException, NotImplementedError):
    """Something of Feast's that Headrace doesn't do: one line in Feast's command line, no traceback."""


class HeadraceOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store` in feature_store.yaml."""

    type: Literal["registry.offline.HeadraceOfflineStore"] = "registry.offline.HeadraceOfflineStore"


class HeadraceOfflineStore(OfflineStore):
    """Holds nothing: Feast's own store would look for files that nobody writes."""

    @staticmethod
    def get_historical_features(*_: Any, **__: Any) -> NoReturn:
        """Refused: see the message."""
        msg = (
            "Headrace has no offline store yet, so get_historical_features has nothing to read: "
            "log the features that a model is served (POST /v1/features, get_online_features) and train on those"
        )
        raise NotOfferedError(msg)

    @staticmethod
    def pull_latest_from_table_or_query(*_: Any, **__: Any) -> NoReturn:
        """Refused: Feast materializes through this."""
        msg = (
            "there is nothing to materialize: Headrace's rows are written by its stream (`headrace stream`), "
            "and old events are sent through it by `headrace replay FILE`"
        )
        raise NotOfferedError(msg)

    pull_all_from_table_or_query = pull_latest_from_table_or_query
