"""A server's process, which has Feast answer what the plan does not know: `python -m headrace.server`.

Services and on-demand views that were made in Feast are answered by `/get-online-features` too, as `feast serve` would.
Feast is imported when the first of them is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import orjson

from config.settings import Settings
from serving.feast import FeastProblem, FeastRequest
from serving.worker import main


class FeastAnswers:
    """Answers by Feast's SDK, from the registry that feature_store.yaml names."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __call__(self, body: FeastRequest) -> bytes:
        """What Feast answers, as `feast serve` writes it.

        Raises:
            FeastProblem: if it can't, with Feast's own error.
        """
        from feast.errors import FeastError
        from feast.feature_server_utils import convert_response_to_dict

        try:
            store: Any = self._store
            wanted = store.get_feature_service(body.feature_service) if body.feature_service else body.features
            answer = store.get_online_features(wanted, body.entities, full_feature_names=body.full_feature_names)
            return orjson.dumps(_without_empty(convert_response_to_dict(answer.proto)))
        except FeastError as error:
            raise FeastProblem(error.http_status_code(), type(error).__name__, str(error)) from error
        except (ValueError, KeyError) as error:
            raise FeastProblem(422, "FeastError", str(error)) from error

    @cached_property
    def _store(self) -> Any:
        from feast import FeatureStore

        import registry.online  # noqa: F401  # Feast is set up by our package: see there

        store: Any = FeatureStore(repo_path=str(self._settings.repo))
        if "redis_url" in type(store.config.online_store).model_fields:
            store.config.online_store.redis_url = self._settings.redis_url.get_secret_value()
        return store


def _without_empty(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """As `serving.wire.FeastAnswer` has it: Feast's remote client ends with an error at `[]`."""
    for result in document["results"]:
        result["values"] = [None if value in ([], {}) else value for value in result["values"]]
    return document


if __name__ == "__main__":
    main(FeastAnswers)
