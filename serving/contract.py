"""What the answers look like, for the OpenAPI document: JSON Schemas of what `serving.wire` and the routes write."""

from __future__ import annotations

from typing import Any, Final

Schema = dict[str, Any]


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """An object with these members and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TEXT: Final[Schema] = {"type": "string"}
_INT: Final[Schema] = {"type": "integer"}
_MS: Final[Schema] = {"type": ["integer", "null"], "description": "ms since the epoch"}
_VALUE: Final[Schema] = {
    "description": "A feature's value; null where there is none, an object by bucket",
    "type": ["number", "boolean", "string", "null", "array", "object"],
    "items": _TEXT,
    "additionalProperties": {"type": ["number", "null"]},
}
_FEATURES: Final[Schema] = {"type": "object", "additionalProperties": _VALUE}
_STATUS: Final[Schema] = {"enum": ["PRESENT", "NOT_FOUND", "UNAVAILABLE"]}
_EXPLAIN: Final[Schema] = {"type": "object", "description": "How each feature comes about, if that was asked"}
_INCOMPLETE: Final[Schema] = {
    "type": "object",
    "description": "Features that lack earlier events: until when; null where waiting does not mend that",
    "additionalProperties": _MS,
}
_DEGRADED: Final[Schema] = {"type": "integer", "description": "How many rows could not be read"}

RANKING: Final = _object(
    {
        "service": _TEXT,
        "plan": _TEXT,
        "as_of": _INT,
        "user": _object(
            {
                "id": {"type": ["string", "null"]},
                "status": {"enum": [*_STATUS["enum"], None]},
                "last_event_at": _MS,
                "features": _FEATURES,
            },
            {"explain": _EXPLAIN},
        ),
        "features": _list(_TEXT),
        "items": _list(_object({"id": _TEXT, "status": _STATUS, "values": _list(_VALUE)}, {"explain": _EXPLAIN})),
    },
    {"degraded": _DEGRADED, "incomplete": _INCOMPLETE},
)

ENTITY: Final = _object(
    {
        "entity": _TEXT,
        "id": _TEXT,
        "status": _STATUS,
        "last_event_at": _MS,
        "as_of": _INT,
        "plan": _TEXT,
        "service": {"type": ["string", "null"]},
        "features": _FEATURES,
    },
    {"degraded": _DEGRADED, "incomplete": _INCOMPLETE},
)

SERVICE: Final = _object(
    {
        "service": _TEXT,
        "plan": _TEXT,
        "features": _list(_object({"name": _TEXT, "type": _TEXT, "entities": _list(_TEXT), "doc": _TEXT})),
        "matrix": _list(_TEXT),
    },
    {"incomplete": _INCOMPLETE},
)

FEAST: Final = _object(
    {
        "metadata": _object({"feature_names": _list(_TEXT)}),
        "results": _list(
            _object({"values": _list({}), "statuses": _list(_TEXT), "event_timestamps": _list(_TEXT)}),
        ),
    }
)

FORGET: Final = _object({"entity": _TEXT, "id": _TEXT, "ordered_at": _INT})
HEALTH: Final = _object({"status": _TEXT})
READY: Final = _object({"status": _TEXT, "plan": _TEXT})

PROBLEM: Final[Schema] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": _TEXT,
        "title": _TEXT,
        "status": _INT,
        "detail": _TEXT,
        "errors": _list(
            {"type": "object", "required": ["field", "detail"], "properties": {"field": _TEXT, "detail": _TEXT}}
        ),
    },
}

FEAST_ERROR: Final[Schema] = {
    "type": "string",
    "contentMediaType": "application/json",
    "description": "JSON in a text: module, class and message, of which Feast's clients make an exception",
}

SECURITY: Final[Schema] = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key: id.secret"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same"},
}
"""The ways to send a key; either will do."""
