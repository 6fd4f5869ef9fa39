"""For users of the Feast SDK: `with as_of(now_ms): store.get_online_features(…)`."""

from registry.online import as_of

__all__ = ["as_of"]
