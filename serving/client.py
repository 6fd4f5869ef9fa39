"""A typed client that hands a ranking service a numpy matrix.

For example:

    with Client("http://127.0.0.1:8000") as client:
        ranking = client.features("ranking_v1", user_id="u1", item_ids=["i1", "i2"])
        scores = model.predict(ranking.matrix)

A server that has too much to do says when to come back (503 or 429 with `Retry-After`): the clients do, if there is
time for it within the call's deadline.
"""

from __future__ import annotations

import asyncio
import io
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from tokenize import TokenError
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray


class HeadraceError(RuntimeError):
    """The server answered with a problem, or as no Headrace server does.

    `problem` is the problem's document, `status` the HTTP status.
    """

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")
        self.status = status
        self.problem = problem


@dataclass(frozen=True)
class Ranking:
    """Features of candidate items: `matrix` is float32[items, features], NaN for null, its columns are `names`.

    Those that are `incomplete` lack events of before they were applied.
    """

    matrix: NDArray[np.float32]
    names: tuple[str, ...]
    plan: str
    incomplete: frozenset[str] = frozenset()

    def column(self, name: str) -> NDArray[np.float32]:
        """float32[items]: one feature; ValueError if the service has none of that name."""
        found: NDArray[np.float32] = self.matrix[:, self.names.index(name)]
        return found


class _Calls:
    """What both clients send, and how they read the answers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._names: dict[tuple[str, str], tuple[str, ...]] = {}

    @staticmethod
    def _options(base_url: str, key: str | None, verify: ssl.SSLContext | bool) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        return {"base_url": base_url, "headers": headers, "verify": verify}

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
    def _pause_s(response: httpx.Response, left_s: float) -> float | None:
        """How long to wait before the same is asked again; None if it shall not be."""
        after = response.headers.get("retry-after", "")
        if response.status_code not in (429, 503) or not after.isdigit():
            return None
        # Not all at one moment: those who were refused together would be too many together again.
        pause_s = int(after) + random.uniform(0, 0.1)
        return pause_s if pause_s < left_s else None

    @staticmethod
    def _checked(response: httpx.Response) -> httpx.Response:
        if response.status_code != httpx.codes.OK:
            is_problem = response.headers.get("content-type", "").startswith("application/problem+json")
            problem = _document(response) if is_problem else {"title": response.reason_phrase}
            raise HeadraceError(response.status_code, problem)
        return response

    @staticmethod
    def _entity_request(entity: str, entity_id: str, service: str | None) -> dict[str, Any]:
        params = {"service": service} if service else {}
        return {"method": "GET", "url": _entity_path(entity, entity_id), "params": params}

    @staticmethod
    def _names_request(service: str, response: httpx.Response) -> dict[str, Any]:
        return {"method": "GET", "url": f"/v1/services/{service}", "params": {"plan": _plan(response)}}

    @staticmethod
    def _left_s(until_s: float) -> float:
        return max(until_s - time.monotonic(), 0.001)

    def _known_names(self, service: str, response: httpx.Response) -> tuple[str, ...] | None:
        """The columns' names, from the answer or from an earlier one of the same plan."""
        if (header := response.headers.get("x-feature-names")) is not None:
            self._names[service, _plan(response)] = tuple(header.split(","))
        return self._names.get((service, _plan(response)))

    def _learn(self, service: str, response: httpx.Response) -> tuple[str, ...]:
        document = _document(self._checked(response))
        try:
            plan, names = document["plan"], tuple(map(str, document["matrix"]))
        except (KeyError, TypeError) as error:
            raise _strange(response, "a document without a plan's columns") from error
        return self._names.setdefault((service, plan), names)


def _ranking(response: httpx.Response, names: tuple[str, ...], n_items: int) -> Ranking:
    """What the matrix says of itself is compared before any of it is believed."""
    body = io.BytesIO(response.content)
    try:
        np.lib.format.read_magic(body)
        header = np.lib.format.read_array_header_1_0(body)
        values = np.frombuffer(body.read(), "<f4").reshape(n_items, len(names))
    except (ValueError, SyntaxError, TokenError) as error:  # numpy reads a header as Python
        raise _strange(response, f"no matrix ({error})") from error
    if header != ((n_items, len(names)), False, values.dtype):
        raise _strange(response, f"a matrix of {header}")
    lacking = response.headers.get("x-incomplete-columns", "")
    try:
        incomplete = frozenset(names[int(at)] for at in lacking.split(",") if at)
    except (ValueError, IndexError) as error:
        raise _strange(response, f"no columns by {lacking[:100]!r}") from error
    return Ranking(values.copy(), names, _plan(response), incomplete)


def _document(response: httpx.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except (ValueError, RecursionError) as error:
        raise _strange(response, f"no JSON ({error})") from error
    if not isinstance(document, dict):
        raise _strange(response, "no JSON object")
    return document


def _plan(response: httpx.Response) -> str:
    if "x-plan" not in response.headers:
        raise _strange(response, "without an X-Plan header")
    plan: str = response.headers["x-plan"]
    return plan


def _strange(response: httpx.Response, what: str) -> HeadraceError:
    detail = f"{response.request.url} answered {what}; is this the address of a Headrace server?"
    return HeadraceError(response.status_code, {"title": "Not an answer of Headrace", "detail": detail})


class Client(_Calls):
    """The blocking client. Safe to share between threads.

    Args:
        base_url: the server's, such as http://127.0.0.1:8000.
        timeout_s: bounds every call.
        key: an API key, if the server asks for one.
        verify: how to check the server's certificate, as httpx takes it.
    """

    def __init__(
        self, base_url: str, timeout_s: float = 2.0, *, key: str | None = None, verify: ssl.SSLContext | bool = True
    ) -> None:
        super().__init__(timeout_s)
        self._http = httpx.Client(**self._options(base_url, key, verify))

    def features(self, service: str, user_id: str | None, item_ids: Sequence[str], as_of: int | None = None) -> Ranking:
        """The features of one user (None for an anonymous one) and candidate items, a row an item, in the order asked.

        Raises:
            HeadraceError: if the server answers with a problem, or as none of ours does.
            httpx.HTTPError: if it does not answer in time.
        """
        until_s = time.monotonic() + self._timeout_s
        request = self._ranking_request(service, user_id, item_ids, as_of)
        response = self._checked(self._send(until_s, request))
        names = self._known_names(service, response) or self._learn(
            service, self._send(until_s, self._names_request(service, response))
        )
        return _ranking(response, names, len(item_ids))

    def entity(self, entity: str, entity_id: str, service: str | None = None) -> dict[str, Any]:
        """One entity's features, as `GET /v1/entities/{entity}/{id}` answers."""
        until_s = time.monotonic() + self._timeout_s
        return _document(self._checked(self._send(until_s, self._entity_request(entity, entity_id, service))))

    def _send(self, until_s: float, request: dict[str, Any]) -> httpx.Response:
        while True:
            response = self._http.request(**request, timeout=self._left_s(until_s))
            pause_s = self._pause_s(response, until_s - time.monotonic())
            if pause_s is None:
                return response
            time.sleep(pause_s)

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
    """The client for asyncio; made as `Client`."""

    def __init__(
        self, base_url: str, timeout_s: float = 2.0, *, key: str | None = None, verify: ssl.SSLContext | bool = True
    ) -> None:
        super().__init__(timeout_s)
        self._http = httpx.AsyncClient(**self._options(base_url, key, verify))

    async def features(
        self, service: str, user_id: str | None, item_ids: Sequence[str], as_of: int | None = None
    ) -> Ranking:
        """As `Client.features`."""
        until_s = time.monotonic() + self._timeout_s
        request = self._ranking_request(service, user_id, item_ids, as_of)
        response = self._checked(await self._send(until_s, request))
        names = self._known_names(service, response) or self._learn(
            service, await self._send(until_s, self._names_request(service, response))
        )
        return _ranking(response, names, len(item_ids))

    async def entity(self, entity: str, entity_id: str, service: str | None = None) -> dict[str, Any]:
        """As `Client.entity`."""
        until_s = time.monotonic() + self._timeout_s
        return _document(self._checked(await self._send(until_s, self._entity_request(entity, entity_id, service))))

    async def _send(self, until_s: float, request: dict[str, Any]) -> httpx.Response:
        while True:
            response = await self._http.request(**request, timeout=self._left_s(until_s))
            pause_s = self._pause_s(response, until_s - time.monotonic())
            if pause_s is None:
                return response
            await asyncio.sleep(pause_s)

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
