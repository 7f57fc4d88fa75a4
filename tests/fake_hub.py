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
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/owner/model"):
                if "/revision/" in path and path.rsplit("/", 1)[1] not in ("main", COMMIT, "v1"):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                tree = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": COMMIT} for f in folder.iterdir()
                ]
                content = tree if "/tree/" in path else {"id": "owner/model", "sha": COMMIT, "siblings": files}
                return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
            file = folder / path.rsplit("/", 1)[1]
            if path.startswith("/owner/model/resolve/") and file.is_file():
                requests.append(f"{self.command} {file.name}")
                return self.send_file(file.read_bytes(), body)
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

        def send_file(self, content: bytes, body: bool) -> None:
            headers = {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            wanted = self.headers.get("Range")
            if wanted is None:
                return self.send(200, content, headers, body)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            requests.append(f"from byte {start}")
            return self.send(206, content[start:], headers, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
