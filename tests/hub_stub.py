"""A minimal hub with one repository on 127.0.0.1 for downloads by huggingface_hub, which can be interrupted."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A context in which the repository `name` holds the files of `folder`.

    Attributes:
        endpoint: for HF_ENDPOINT.
        breaks: name of a file to bytes after which its downloads break off.
        heals: whether they do so only once.
        ranges: (file, first byte asked for) of every download of a file.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.breaks: dict[str, int] = {}
        self.heals = False
        self.ranges: list[tuple[str, int]] = []

    def __enter__(self) -> "Hub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self, body=True)

            def do_HEAD(self):
                hub.answer(self, body=False)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, *, body):
        path = unquote(urlsplit(request.path).path)
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        if path in (f"/api/models/{self.name}", f"/api/models/{self.name}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._json(request, 200, {"id": self.name, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{self.name}/tree/"):
            self._json(request, 200, [{"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                                      for name, data in files.items()])
        elif (match := re.fullmatch(rf"/{self.name}/resolve/\w+/(.+)", path)) and match[1] in files:
            self._file(request, match[1], files[match[1]], body)
        else:
            self._json(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _file(self, request, name, data, body):
        first = int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-"))[1])
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(data)}"', "Accept-Ranges": "bytes",
                   "Content-Length": str(len(data) - first)}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        request.send_response(206 if first else 200)
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            self.ranges.append((name, first))
            end = self.breaks.pop(name, None) if self.heals else self.breaks.get(name)
            request.wfile.write(data[first:] if end is None else data[first:end])  # fewer than promised: broken off

    def _json(self, request, status, content, headers=None):
        text = json.dumps(content).encode()
        request.send_response(status)
        fixed = {"Content-Type": "application/json", "Content-Length": str(len(text))}
        for key, value in (fixed | (headers or {})).items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(text)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
