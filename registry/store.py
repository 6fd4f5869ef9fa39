"""The applied plan: written to Feast's registry by `apply`, read from there by streams and servers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import structlog
import yaml  # type: ignore[import-untyped]  # its stubs are not among our dependencies
from feast import FeatureStore, OnDemandFeatureView
from feast.errors import FeastObjectNotFoundException

from features.plan import Plan
from registry.compile import PLAN_TAG, compile_to_feast
from registry.definitions import compile_definitions
from registry.settings import Settings

log = structlog.get_logger()


class NotAppliedPlanError(RuntimeError):
    """There is no applied plan."""


def project_of(repo: Path) -> str:
    """The project's name, from feature_store.yaml.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it names no project.
    """
    path = repo / "feature_store.yaml"
    if not path.exists():
        msg = f"no feature_store.yaml in {repo.resolve()}: run in the project's folder, or set HEADRACE_REPO to it"
        raise FileNotFoundError(msg)
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path} is no YAML: {' '.join(str(error).split())}"
        raise ValueError(msg) from error
    project = settings.get("project") if isinstance(settings, dict) else None
    if not isinstance(project, str) or re.fullmatch(r"[a-z][a-z0-9_]{0,63}", project) is None:
        msg = f"{path}: project is {project!r}; give it a name of small letters, digits and underscores"
        raise ValueError(msg)
    return project


def applied_plan(store: FeatureStore) -> Plan | None:
    """The plan in the registry, or None."""
    try:
        project = store.registry.get_project(store.project, allow_cache=False)
    except FeastObjectNotFoundException:
        return None
    text = project.tags.get(PLAN_TAG)
    return Plan.decode(text) if text else None


def load_plan(settings: Settings) -> Plan:
    """The applied plan, for those who run it; says so when the definitions are not what is applied.

    Raises:
        NotAppliedPlanError: if nothing was applied.
    """
    project_of(settings.repo)
    plan = applied_plan(FeatureStore(repo_path=str(settings.repo)))
    if plan is None:
        msg = f"nothing is applied in {settings.repo.resolve()}: run `headrace apply` first"
        raise NotAppliedPlanError(msg)
    if different := changes(plan, compile_definitions(settings.definitions, plan.project, plan.shards)):
        remedy = "the applied plan runs; see `headrace plan`, then `headrace apply`"
        log.warning("definitions_differ", plan=plan.fingerprint, changes=different[:10], remedy=remedy)
    return plan


def register(store: FeatureStore, plan: Plan, kafka: str) -> None:
    """Makes Feast's registry hold the plan and its objects, and nothing else of this project."""
    made = list(compile_to_feast(plan, kafka).values())
    names = {(_kind(each), each.name) for each in made}
    registry, project = store.registry, store.project
    there: list[Any] = [
        *registry.list_feature_services(project),
        *registry.list_on_demand_feature_views(project),
        *registry.list_stream_feature_views(project),
        *registry.list_data_sources(project),
        *registry.list_entities(project),
    ]
    gone = [each for each in there if each.name != "__dummy" and (_kind(each), each.name) not in names]
    archives = {f"{spec.topic}_archive" for spec in plan.events}
    store.apply(made, objects_to_delete=[each for each in gone if each.name not in archives], partial=not gone)


def _kind(made: Any) -> str:
    """What Feast's registry reads an object back as."""
    return "OnDemandFeatureView" if isinstance(made, OnDemandFeatureView) else type(made).__name__


def changes(applied: Plan | None, declared: Plan) -> list[str]:
    """What applying `declared` would change, a line each; none when it is what is applied."""
    before, after = (_items(plan) if plan else {} for plan in (applied, declared))
    lines = [f"+ {name}" for name in after if name not in before]
    lines += [f"- {name}" for name in before if name not in after]
    for name in after:
        if name in before and before[name] != after[name]:
            lines += [f"~ {name}: {difference}" for difference in _differences(before[name], after[name])]
    if applied is not None and not lines and applied.fingerprint != declared.fingerprint:
        lines.append("~ plan: the features of a view are in another order")
    return lines


def _items(plan: Plan) -> dict[str, Any]:
    """Everything in a plan that has a name, as plain data."""
    return dict(_named_items(plan))


def _named_items(plan: Plan) -> Iterator[tuple[str, Any]]:
    yield "settings", {"project": plan.project, "shards": plan.shards, "plan version": plan.version}
    for kind, specs in (("entity", plan.entities), ("contract", plan.events), ("service", plan.services)):
        for spec in specs:
            yield f"{kind} {spec.name}", msgspec.to_builtins(spec)
    for view in plan.views:
        plain = msgspec.to_builtins(view)
        for feature in plain.pop("features"):
            yield f"feature {view.name}.{feature['name']}", feature
        yield f"view {view.name}", plain


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if old != new:
            yield f"{key} {_change(old, new)}"


def _change(old: Any, new: Any) -> str:
    """What is new and what is gone of a list or dictionary; otherwise both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = ([f"{key}: {value}" for key, value in each.items()] for each in (old, new))
    if isinstance(old, list) and isinstance(new, list):
        changed = [f"+{each}" for each in new if each not in old] + [f"-{each}" for each in old if each not in new]
        return ", ".join(changed) or "in another order"
    return f"{old} -> {new}"
