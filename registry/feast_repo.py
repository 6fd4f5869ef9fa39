"""What `feast apply` imports: the same objects that `headrace apply` registers."""

from pathlib import Path

from config.settings import Settings, project_of
from features.definitions import compile_definitions
from registry.compile import compile_to_feast

_settings = Settings(repo=Path(__file__).resolve().parent.parent)
_plan = compile_definitions(_settings.definitions, project_of(_settings.repo), _settings.shards)
# Feast looks at a module's attributes.
globals().update(compile_to_feast(_plan, _settings.kafka))
