"""The plan that Feast's registry holds, and features as Feast names them."""

from __future__ import annotations

import base64
import bz2
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from feast.errors import FeastObjectNotFoundException, FeatureViewNotFoundException
from feast.infra.registry.base_registry import BaseRegistry

from features.plan import Plan

PLAN_SOURCE: Final = "headrace_plan"
"""A data source that says what is applied: Feast's lists leave its tags out, and a project is others' as well."""
PLAN_TAG: Final = "headrace.plan"


def registered_plan(registry: BaseRegistry, project: str, *, allow_cache: bool = False) -> Plan | None:
    """The plan in the registry, or None."""
    try:
        text = registry.get_data_source(PLAN_SOURCE, project, allow_cache=allow_cache).tags.get(PLAN_TAG)
    except FeastObjectNotFoundException:
        text = _of_project(registry, project, allow_cache=allow_cache)
    return _decode(text) if text else None


def plan_of(registry: BaseRegistry, project: str) -> Plan:
    """The registered plan, as the registry's cache has it.

    Raises:
        FeastObjectNotFoundException: if there is none.
    """
    plan = registered_plan(registry, project, allow_cache=True)
    if plan is None:
        msg = f"project {project!r} has no Headrace plan in this registry: run `headrace apply`"
        raise FeastObjectNotFoundException(msg)
    return plan


def _of_project(registry: BaseRegistry, project: str, *, allow_cache: bool) -> str | None:
    """The plan where it was before it had a source of its own: its text in the project's tags."""
    try:
        return registry.get_project(project, allow_cache=allow_cache).tags.get(PLAN_TAG)
    except FeastObjectNotFoundException:
        return None


def full_names_of(plan: Plan, references: Iterable[str]) -> list[str]:
    """Full names of `view:feature` references, without the join keys that Feast lists among a view's features.

    Raises:
        FeatureViewNotFoundException: if a view isn't in the plan.
        KeyError: as in Feast, if a view of the plan has no such feature.
    """
    # Only the view's own key: a feature may have the name of another entity's.
    keys = {f"{view.name}__{plan.entity(entity).key}" for view in plan.views for entity in view.entities}
    plain = (each.replace("@latest:", ":", 1) for each in references)  # Of versions a plan has one.
    names = [name for name in (each.replace(":", "__", 1) for each in plain) if name not in keys]
    for name in names:
        if name not in plan.features:
            view = name.partition("__")[0]
            if view not in {spec.name for spec in plan.views}:
                raise FeatureViewNotFoundException(view, plan.project)  # type: ignore[no-untyped-call]  # it has no types
            msg = f"no feature {name!r} is applied; run `headrace plan` to compare the definitions with what is"
            raise KeyError(msg)
    return names


def ordered_as_a_service(plan: Plan, full_names: list[str], name: str = "") -> list[str]:
    """The features of a whole service in its order, as Feast's varies from process to process; others as they are.

    Of services with the same features it is the one of this name, if that is known.
    """
    wanted = set(full_names)
    same = [spec for spec in plan.services if set(spec.features) == wanted]
    same.sort(key=lambda spec: spec.name != name)
    return list(same[0].features) if same else full_names


def to_tag(plan: Plan) -> str:
    """A plan as the registry holds it: a fifth of its text, and no word of it, or Feast's search would find it by each.

    By bzip2, which writes the same everywhere: to Feast another text is another source.
    """
    return base64.b64encode(bz2.compress(plan.encode().encode())).decode()


def _from_tag(tag: str) -> Plan:
    return Plan.decode(tag if tag.startswith("{") else bz2.decompress(base64.b64decode(tag)).decode())


_decode: Callable[[str], Plan] = lru_cache(maxsize=8)(_from_tag)
