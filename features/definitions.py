"""From an importable package of declarations to a plan."""

from __future__ import annotations

import importlib

from features.compile import compile_plan
from features.plan import Plan


class DefinitionsError(ValueError):
    """The definitions can't be found, or hold no service."""


def compile_definitions(definitions: str, project: str, shards: int) -> Plan:
    """The plan of what the package `definitions` declares.

    Raises:
        DefinitionsError: if it can't be imported or declares no service.
        DeclarationError: if a declaration is wrong.
    """
    try:
        module = importlib.import_module(definitions)
    except ModuleNotFoundError as error:
        if error.name is None or not definitions.startswith(error.name):
            raise
        msg = (
            f"HEADRACE_DEFINITIONS={definitions!r} can't be imported: "
            "install the package, or add its folder to PYTHONPATH"
        )
        raise DefinitionsError(msg) from error
    plan = compile_plan([vars(module)], project, shards)
    if not plan.services:
        msg = f"{definitions} declares no service: add one, such as ranking_v1 = service('ranking_v1', UserActivity)"
        raise DefinitionsError(msg)
    return plan
