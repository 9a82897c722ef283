"""A Hugging Face hub of a few repositories on a local port, as far as downloading goes."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

GATED = "gated/model"
BROKEN = "broken/model"


class FakeHub:
    """Serves folders as repositories. `GATED` refuses everybody; `BROKEN` fails; others do not exist.

    Attributes:
        url: what HF_ENDPOINT is to be set to.
        downloads: ``repo/file`` of every file whose content was asked for, in order.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.downloads: list[str] = []


@contextmanager
def fake_hub(repositories: Mapping[str, Path]) -> Iterator[FakeHub]:
    """Serve these folders, by repository id, until the context ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub, server.repositories = hub, dict(repositories)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def _answer(self, with_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        org, name, *rest = parts[2:] if is_api else parts
        repo = f"{org}/{name}"
        if repo == GATED:
            self._refuse(403, "GatedRepo", "Access to this model is restricted.")
        elif repo == BROKEN:
            self._refuse(500, "", "Internal error.")
        elif repo not in self.server.repositories:
            self._refuse(401, "RepoNotFound", "Repository not found.")
        elif is_api:
            self._answer_api(repo, self.server.repositories[repo], rest)
        else:
            self._answer_file(repo, self.server.repositories[repo].joinpath(*rest[2:]), "/".join(rest[2:]), with_body)

    def _answer_api(self, repo: str, folder: Path, rest: list[str]) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _etag(path)}
                for path in files
            ]
            self._send(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
            self._send(200, json.dumps({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _answer_file(self, repo: str, path: Path, file_name: str, with_body: bool) -> None:
        if not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found.")
            return
        if with_body:
            self.server.hub.downloads.append(f"{repo}/{file_name}")
        self._send(200, path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message} if code else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
