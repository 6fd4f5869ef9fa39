"""What the definitions declare in Feast's own words: ordinary views, and whatever else Feast has for its users.

It stands in modules of the definitions that import Feast, which streams and servers never import: of ordinary views
they have what the plan says.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final, NamedTuple

from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView
from feast.data_source import DataSource
from feast.permissions.permission import Permission

from config.settings import Settings, project_of
from features.checks import mistake
from features.definitions import feast_modules
from features.plan import Plan
from registry.given import with_ordinary

_KINDS: Final = (Entity, FeatureView, OnDemandFeatureView, FeatureService, DataSource, Permission)


class Declared(NamedTuple):
    """Feast's objects as they are declared, and a plan of their ordinary views alone."""

    objects: tuple[Any, ...]
    plan: Plan


def declared(settings: Settings) -> Declared:
    """What is declared in Feast's words.

    Raises:
        DeclarationError: if an ordinary view has no schema.
    """
    modules = map(import_module, feast_modules(settings.definitions))
    found = {id(each): each for module in modules for each in vars(module).values()}
    objects = tuple(each for each in found.values() if isinstance(each, _KINDS))
    views = [each for each in objects if isinstance(each, FeatureView)]
    for view in views:
        if not view.features:
            right = 'name its fields: schema=[Field(name="price", dtype=Float64)]'
            place = f"FeatureView {view.name}"
            raise mistake(place, "has no schema, which Feast would guess from its data", right)
    entities = [each for each in objects if isinstance(each, Entity)]
    nothing = Plan(project_of(settings.repo), settings.shards, (), (), (), ())
    return Declared(objects, with_ordinary(nothing, views, entities))
