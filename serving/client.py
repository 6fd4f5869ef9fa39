"""A typed client that hands a ranking service a numpy matrix.

For example:

    with Client("http://127.0.0.1:8000") as client:
        ranking = client.features("ranking_v1", user_id="u1", item_ids=["i1", "i2"])
        scores = model.predict(ranking.matrix)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray


class HeadraceError(RuntimeError):
    """The server answered with a problem; `problem` is its document, `status` its HTTP status."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")
        self.status = status
        self.problem = problem


@dataclass(frozen=True)
class Ranking:
    """Features of candidate items: `matrix` is float32[items, features], NaN for null, its columns are `names`."""

    matrix: NDArray[np.float32]
    names: tuple[str, ...]
    plan: str

    def column(self, name: str) -> NDArray[np.float32]:
        """float32[items]: one feature; ValueError if the service has none of that name."""
        found: NDArray[np.float32] = self.matrix[:, self.names.index(name)]
        return found


class _Calls:
    """What both clients send, and how they read the answers."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], tuple[str, ...]] = {}

    @staticmethod
    def _ranking_request(
        service: str, user_id: str | None, item_ids: Sequence[str], as_of: int | None
    ) -> dict[str, Any]:
        body = {
            "service": service,
            "user_id": user_id,
            "item_ids": list(item_ids),
            **({"as_of": as_of} if as_of is not None else {}),
        }
        return {"method": "POST", "url": "/v1/features", "json": body, "headers": {"Accept": "application/x-npy"}}

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        if response.status_code != httpx.codes.OK:
            is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
            raise HeadraceError(
                response.status_code, response.json() if is_problem else {"title": response.reason_phrase}
            )
        return response

    def _known_names(self, service: str, response: httpx.Response) -> tuple[str, ...] | None:
        """The columns' names, from the answer or from an earlier one of the same plan."""
        if (header := response.headers.get("x-feature-names")) is not None:
            self._names[service, response.headers["x-plan"]] = tuple(header.split(","))
        return self._names.get((service, response.headers["x-plan"]))

    def _learn(self, service: str, response: httpx.Response) -> tuple[str, ...]:
        document = self._checked(response).json()
        return self._names.setdefault((service, document["plan"]), tuple(document["matrix"]))


def _matrix(response: httpx.Response) -> NDArray[np.float32]:
    matrix: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
    return matrix


class Client(_Calls):
    """The blocking client. Safe to share between threads; `timeout_s` bounds every call."""

    def __init__(self, base_url: str, timeout_s: float = 2.0) -> None:
        super().__init__()
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s)

    def features(self, service: str, user_id: str | None, item_ids: Sequence[str], as_of: int | None = None) -> Ranking:
        """The features of one user (None for an anonymous one) and candidate items, a row an item, in the order asked.

        Raises:
            HeadraceError: if the server answers with a problem.
            httpx.HTTPError: if it does not answer in time.
        """
        response = self._checked(self._http.request(**self._ranking_request(service, user_id, item_ids, as_of)))
        names = self._known_names(service, response) or self._learn(
            service, self._http.get(f"/v1/services/{service}", params={"plan": response.headers["x-plan"]})
        )
        return Ranking(_matrix(response), names, response.headers["x-plan"])

    def entity(self, entity: str, entity_id: str, service: str | None = None) -> dict[str, Any]:
        """One entity's features, as `GET /v1/entities/{entity}/{id}` answers."""
        params = {"service": service} if service else {}
        document: dict[str, Any] = self._checked(self._http.get(_entity_path(entity, entity_id), params=params)).json()
        return document

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Calls):
    """The client for asyncio."""

    def __init__(self, base_url: str, timeout_s: float = 2.0) -> None:
        super().__init__()
        self._http = httpx.AsyncClient(base_url=base_url, timeout=timeout_s)

    async def features(
        self, service: str, user_id: str | None, item_ids: Sequence[str], as_of: int | None = None
    ) -> Ranking:
        """As `Client.features`."""
        response = self._checked(await self._http.request(**self._ranking_request(service, user_id, item_ids, as_of)))
        names = self._known_names(service, response) or self._learn(
            service, await self._http.get(f"/v1/services/{service}", params={"plan": response.headers["x-plan"]})
        )
        return Ranking(_matrix(response), names, response.headers["x-plan"])

    async def entity(self, entity: str, entity_id: str, service: str | None = None) -> dict[str, Any]:
        """As `Client.entity`."""
        params = {"service": service} if service else {}
        document: dict[str, Any] = self._checked(
            await self._http.get(_entity_path(entity, entity_id), params=params)
        ).json()
        return document

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _entity_path(entity: str, entity_id: str) -> str:
    from urllib.parse import quote

    # A path of dots would be shortened on the way.
    return f"/v1/entities/{quote(entity, safe='')}/{quote(entity_id, safe='').replace('.', '%2E')}"
