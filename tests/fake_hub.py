"""A Hugging Face hub on this machine: one repository of a folder's files, under the name owner/model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_of(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the requests for files that it gets: "GET model.safetensors" and the like."""
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Hub"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        file = self.server.folder / path.rsplit("/", 1)[1]
        if path.startswith("/api/models/owner/model"):
            self.describe(path)
        elif path.startswith("/owner/model/resolve/") and file.is_file():
            self.send_file(file)
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def describe(self, path: str) -> None:
        """Which files there are."""
        files = sorted(self.server.folder.iterdir())
        tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in files]
        model = {"id": "owner/model", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
        if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", COMMIT, "v1"):
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            content = json.dumps(tree if "/tree/" in path else model).encode()
            self.send(200, content, {"Content-Type": "application/json"})

    def send_file(self, file: Path) -> None:
        content = file.read_bytes()
        self.server.requests.append(f"{self.command} {file.name}")
        self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


class Hub(ThreadingHTTPServer):
    """The server of a folder's files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
