"""What applying one plan over another would change, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from features.evolve import as_declared
from features.plan import Plan


def changes(applied: Plan | None, declared: Plan) -> list[str]:
    """What applying `declared` would change, a line each; none when it is what is applied."""
    plans = [as_declared(plan) if plan else None for plan in (applied, declared)]
    before, after = (_items(plan) if plan else {} for plan in plans)
    lines = [f"+ {name}" for name in after if name not in before]
    lines += [f"- {name}" for name in before if name not in after]
    for name in after:
        if name in before and before[name] != after[name]:
            lines += [f"~ {name}: {difference}" for difference in _differences(before[name], after[name])]
    if applied is not None and not lines and plans[0] != plans[1]:
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
