"""From an importable package of declarations to a plan."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType
from typing import Final

from features.compile import compile_plan
from features.plan import Plan

_IMPORTS_FEAST: Final = re.compile(r"^\s*(?:import|from)\s+feast\b", re.MULTILINE)


class DefinitionsError(ValueError):
    """The definitions can't be found, or hold no service."""


def feast_modules(definitions: str) -> list[str]:
    """The modules of the package `definitions` that import Feast: none that a stream or a server imports does.

    Raises:
        DefinitionsError: if the package can't be imported.
    """
    paths = getattr(_imported(definitions), "__path__", ())
    names = (definitions, *(each.name for each in walk_packages(paths, f"{definitions}.")))
    origins = ((name, spec.origin or "") for name in names if (spec := find_spec(name)))
    return [name for name, path in origins if path.endswith(".py") and _IMPORTS_FEAST.search(Path(path).read_text())]


def compile_definitions(definitions: str, project: str, shards: int, ordinary: Plan | None = None) -> Plan:
    """The plan of what the package `definitions` declares, with the ordinary views of another: see `compile_plan`.

    Raises:
        DefinitionsError: if it can't be imported or declares no service.
        DeclarationError: if a declaration is wrong.
    """
    module = _imported(definitions)
    plan = compile_plan([vars(module)], project, shards, ordinary)
    if not plan.services:
        msg = f"{definitions} declares no service: add one, such as ranking_v1 = service('ranking_v1', UserActivity)"
        raise DefinitionsError(msg)
    return plan


def _imported(definitions: str) -> ModuleType:
    try:
        return importlib.import_module(definitions)
    except ModuleNotFoundError as error:
        if error.name is None or not definitions.startswith(error.name):
            raise
        msg = (
            f"HEADRACE_DEFINITIONS={definitions!r} can't be imported: "
            "install the package, or add its folder to PYTHONPATH"
        )
        raise DefinitionsError(msg) from error
