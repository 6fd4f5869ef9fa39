"""The ordinary views that are declared, for commands that start at once where there are none."""

from __future__ import annotations

from config.settings import Settings, project_of
from features.definitions import feast_modules
from features.plan import Plan


def ordinary_of(settings: Settings) -> Plan:
    """A plan of the declared ordinary views alone. Feast is imported if a module of the definitions imports it."""
    if not feast_modules(settings.definitions):
        return Plan(project_of(settings.repo), settings.shards, (), (), (), ())
    from registry.ordinary import declared

    return declared(settings).plan
