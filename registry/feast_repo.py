"""What `feast apply` imports: the same objects that `headrace apply` registers."""

from pathlib import Path

from config.settings import Settings
from registry.compile import compile_to_feast
from store.plans import plan_changes

_settings = Settings(repo=Path(__file__).resolve().parent.parent)
# Feast looks at a module's attributes.
globals().update(compile_to_feast(plan_changes(_settings).plan, _settings))
