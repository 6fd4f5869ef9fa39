"""Feast's own call, `/get-online-features`: what it asks of a plan, and its errors as Feast's clients read them.

Knows the protocol, and not Feast: servers start without it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, TypeAdapter, ValidationError
from starlette.responses import Response

from features.plan import Plan
from serving.problems import Problem

_ERRORS: Final = {401: "FeastPermissionError", 403: "FeastPermissionError", 404: "FeastObjectNotFoundException"}
"""What Feast calls problems that are not of its protocol, by status; others are a `FeastError`."""
_IDS: Final = TypeAdapter(list[StrictStr | StrictInt | None])


class FeastRequest(BaseModel):
    """Feast's own request. Of both, a service and features, it is the service."""

    model_config = ConfigDict(extra="ignore")

    entities: dict[str, list[Any]]
    features: list[str] = []
    feature_service: str | None = None
    full_feature_names: bool = False


Others = Callable[[FeastRequest], bytes]
"""Answers what the plan does not know, or raises a FeastProblem."""


class FeastProblem(Problem):
    """A problem of a class that Feast has: its clients raise `feast.errors.<error>`.

    Attributes:
        elsewhere: whether Feast's registry may know what the plan does not.
    """

    def __init__(self, status: int, error: str, detail: str, *, elsewhere: bool = False) -> None:
        super().__init__(status, error, detail)
        self.error, self.elsewhere = error, elsewhere


def refusal(problem: Problem) -> Response:
    """A problem in the form that `feast serve` sends and Feast's clients make an exception of: JSON, as a JSON text."""
    error = problem.error if isinstance(problem, FeastProblem) else _ERRORS.get(problem.status, "FeastError")
    detail = {"module": "feast.errors", "class": error, "message": problem.document["detail"]}
    return Response(json.dumps(json.dumps(detail)), problem.status, problem.headers, "application/json")


def names_of(plan: Plan, body: FeastRequest) -> tuple[str, ...]:
    """Full names of the features that are asked for, in the order of the answer.

    Raises:
        FeastProblem: if there is no such service, view or feature, none is named, or two would have one name.
    """
    if body.feature_service:
        names = _of_service(plan, body.feature_service)
    elif body.features:
        # Of versions a plan has one, which is the latest.
        names = tuple(_of_reference(plan, each.replace("@latest:", ":", 1)) for each in body.features)
    else:
        detail = "No features specified for retrieval: name features as view:feature, or a feature_service"
        raise FeastProblem(422, "FeastError", detail)
    answered = names if body.full_feature_names else tuple(plan.features[name].name for name in names)
    if twice := [name for name, n in Counter(answered).items() if n > 1]:
        raise FeastProblem(422, "FeatureNameCollisionError", _collision(twice, full=body.full_feature_names))
    return names


def columns_of(plan: Plan, body: FeastRequest) -> dict[str, list[str | None]]:
    """The request's ids by entity key, as texts.

    As in Feast, an entity's name will do for its key, and what is no entity's is left out.

    Raises:
        FeastProblem: if columns differ in length, or hold what is no id.
    """
    if len({len(values) for values in body.entities.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in body.entities.items())
        raise FeastProblem(422, "FeastError", f"entities: every one needs as many values as the others: {lengths}")
    keys = {entity.key: entity.key for entity in plan.entities}
    keys |= {entity.name: entity.key for entity in plan.entities if entity.key not in body.entities}
    return {keys[name]: _ids(name, values) for name, values in body.entities.items() if name in keys}


def _ids(name: str, values: list[Any]) -> list[str | None]:
    try:
        return [str(each) if isinstance(each, int) else each for each in _IDS.validate_python(values)]
    except ValidationError as error:
        at = error.errors()[0]["loc"][0]
        # 1.0 is "1" in one language and "1.0" in another: whichever was chosen could be somebody else's id.
        detail = f"entities.{name}.{at}: an id is a text, a whole number or null, and not {values[int(at)]!r:.100}"
        raise FeastProblem(422, "FeastError", f"{detail}: send the text that is meant") from error


def _of_service(plan: Plan, name: str) -> tuple[str, ...]:
    for spec in plan.services:
        if spec.name == name:
            return spec.features
    applied = ", ".join(spec.name for spec in plan.services)
    detail = (
        f"Feature service {name} does not exist in project {plan.project}'s plan, which has {applied}; "
        "one that was made in Feast is answered by `feast serve`"
    )
    raise FeastProblem(404, "FeatureServiceNotFoundException", detail, elsewhere=True)


def _of_reference(plan: Plan, reference: str) -> str:
    view, colon, feature = reference.partition(":")
    if not colon:
        detail = f"Invalid feature reference {reference!r}. Expected format: '<feature_view>:<feature>'"
        raise FeastProblem(422, "FeastError", detail)
    views = [spec.name for spec in plan.views]
    if view not in views:
        detail = f"Feature view {view} does not exist in project {plan.project}'s plan, which has {', '.join(views)}"
        raise FeastProblem(404, "FeatureViewNotFoundException", detail, elsewhere=True)
    full_name = f"{view}__{feature}"
    if full_name not in plan.features:
        detail = f"Feature {feature} not found in projection {view}: {full_name} is not applied"
        raise FeastProblem(404, "FeastObjectNotFoundException", detail)
    return full_name


def _collision(names: list[str], *, full: bool) -> str:
    """What `feast.errors.FeatureNameCollisionError` says."""
    advice = (
        "To resolve this collision, please ensure that the feature views or their own features have different names. "
        "If you're intentionally joining the same feature view twice on different sets of entities, please rename one "
        "of the feature views with '.with_name'."
        if full
        else "To resolve this collision, either use the full feature name by setting 'full_feature_names=True', or "
        "ensure that the features in question have different names."
    )
    return f"Duplicate features named {', '.join(names)} found.\n{advice}"
