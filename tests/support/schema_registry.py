"""A small schema registry for tests, over HTTP: what Confluent's serialisers and client ask of one, in memory."""

from __future__ import annotations

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from types import TracebackType

TYPE = "application/vnd.schemaregistry.v1+json"


class SchemaRegistry:
    """Serves for the length of a `with` block.

    Args:
        user: `user:password`, if it lets nobody else in.

    Attributes:
        asked: the paths that were asked for.
        failing: the status that everything is answered with, if there is one.
    """

    def __init__(self, user: str = "") -> None:
        self.asked: list[str] = []
        self.failing = 0
        self._user = user
        self._schemas: list[dict[str, Any]] = []
        self._subjects: dict[str, list[int]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def register(self, subject: str, schema: str, kind: str = "AVRO") -> int:
        """Registers a schema; returns its id."""
        return self._register(subject, {"schema": schema, "schemaType": kind})

    def _register(self, subject: str, given: dict[str, Any]) -> int:
        schema = {name: given[name] for name in ("schema", "schemaType", "references") if given.get(name)}
        if schema not in self._schemas:
            self._schemas.append(schema)
        schema_id = self._schemas.index(schema) + 1
        versions = self._subjects.setdefault(subject, [])
        if schema_id not in versions:
            versions.append(schema_id)
        return schema_id

    def _answer(self, method: str, path: str, body: Any) -> Any:
        """The answer, or None for 404."""
        if method == "POST" and (found := re.fullmatch(r"/subjects/([^/]+)/versions", path)):
            return {"id": self._register(unquote(found[1]), body)}
        if method == "POST" and (found := re.fullmatch(r"/subjects/([^/]+)", path)):
            subject = unquote(found[1])
            return self._version(subject, self._subjects[subject].index(self._register(subject, body)) + 1)
        if found := re.fullmatch(r"/schemas/ids/(\d+)", path):
            schema_id = int(found[1])
            return self._schemas[schema_id - 1] if 1 <= schema_id <= len(self._schemas) else None
        if found := re.fullmatch(r"/subjects/([^/]+)/versions/(latest|-?\d+)", path):
            subject = unquote(found[1])
            n = len(self._subjects.get(subject, []))
            number = n if found[2] in ("latest", "-1") else int(found[2])
            return self._version(subject, number) if 1 <= number <= n else None
        return sorted(self._subjects) if path == "/subjects" else None

    def _version(self, subject: str, number: int) -> dict[str, Any]:
        schema_id = self._subjects[subject][number - 1]
        return {"subject": subject, "version": number, "id": schema_id, **self._schemas[schema_id - 1]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._do("GET")

            def do_POST(self) -> None:
                self._do("POST")

            def _do(self, method: str) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                registry.asked.append(self.path)
                wanted = "Basic " + base64.b64encode(registry._user.encode()).decode()
                if registry.failing:
                    self._say(registry.failing, {"error_code": registry.failing, "message": "failing"})
                elif registry._user and self.headers.get("Authorization") != wanted:
                    self._say(401, {"error_code": 401, "message": "Unauthorized"})
                elif (found := registry._answer(method, urlsplit(self.path).path, body)) is None:
                    self._say(404, {"error_code": 40403, "message": "Schema not found"})
                else:
                    self._say(200, found)

            def _say(self, status: int, found: Any) -> None:
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", TYPE)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Says nothing."""

        return Handler
