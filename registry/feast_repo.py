"""The objects that `headrace apply` registers, for Feast to find: see headrace/feast_repo.py."""

from config.settings import Settings
from registry.compile import compile_to_feast
from registry.ordinary import declared
from store.plans import plan_changes

_settings = Settings()
_declared = declared(_settings)
_objects = compile_to_feast(plan_changes(_settings, ordinary=_declared.plan).plan, _settings, _declared.objects)
# Feast looks at a module's attributes.
globals().update(_objects)
__all__ = list(_objects)  # what there is, the plan says
