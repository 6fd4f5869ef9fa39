"""The OpenAPI document against the server: whatever it allows, and what it does not, no 5xx and no answer it hides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from features.plan import Plan
from headrace.embedded import EmbeddedRedis
from serving.app import create_app
from serving.keys import KeyFile, new_key
from tests.support.served import Clock, Rows, catalogue, listening, random_events, settings_of

EXAMPLES = 40
NOBODY = "redis://127.0.0.1:1/0"
RANKING: dict[str, Any] = {
    "service": "ranking_v1",
    "item_ids": ["i1", "?"],
    "items": None,
    "context": {},
    "as_of": None,
}
FEAST = {"features": ["user_activity:clicks_7d"], "entities": {"user_id": ["u1", None, "u2"]}}
HEADERS: dict[str, str] = {}
"""With a key that is good for everything."""
load_all_checks()
WANTED: Any = CHECKS.get_by_names(
    ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    plan: Plan = catalogue()
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key, HEADERS["X-API-Key"] = new_key("all", ["read", "write", "admin"])
    KeyFile(keys=[key]).write(path)
    with EmbeddedRedis() as redis:
        rows = Rows(plan, redis.url, Clock())
        rows.write_all(random_events(3, users=4, items=10, n=200))
        with listening(settings_of(redis.url, api_keys_file=path), plan) as port:
            yield f"http://127.0.0.1:{port}"


def asked(operation: Any, mode: GenerationMode, number: int) -> Counter[int]:
    """Asks a route a number of things; returns how often it answered with which status."""
    answered: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode), is_known=st.booleans())
    def ask(case: Any, is_known: bool) -> None:
        if is_known:  # What there is, and what goes with what, no schema says.
            named = {"entity": "user", "name": "ranking_v1"}
            case.path_parameters.update({name: named[name] for name in named.keys() & case.path_parameters})
            if isinstance(case.body, dict):
                case.body |= RANKING if "service" in case.body else FEAST
        answered[case.call_and_validate(checks=WANTED, headers=HEADERS).status_code] += 1

    try:
        ask()
    except Unsatisfiable:  # There is nothing to break in a route without parameters.
        assert mode is GenerationMode.NEGATIVE
    return answered


def test_whatever_is_asked_is_answered_as_the_contract_says(address: str) -> None:
    """Requests that the document allows, and such as break it in one place, to every route.

    The seed is printed; `asked` with it asks the same again.
    """
    number = random.randrange(1 << 32)
    print("seed", number)
    schema: Any = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:
        seen: Counter[int] = Counter()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            answered = asked(operation, mode, number)
            print(operation.method, operation.path, mode.value, dict(answered))
            seen += answered
        assert seen[200] or seen[202], operation.path


async def test_the_contract_says_which_keys_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    KeyFile().write(path)
    for settings_, is_open in ((settings_of(NOBODY), True), (settings_of(NOBODY, api_keys_file=path), False)):
        document = create_app(settings_, catalogue()).openapi()
        assert ("securitySchemes" in document["components"]) is not is_open
        secured = {
            route for route, methods in document["paths"].items() for each in methods.values() if "security" in each
        }
        read = {"/v1/features", "/v1/entities/{entity}/{entity_id}", "/v1/services/{name}", "/get-online-features"}
        assert secured == (set() if is_open else read)
