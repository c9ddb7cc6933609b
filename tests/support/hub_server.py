"""A server on 127.0.0.1 with the parts of the Hugging Face hub's interface that a download uses. It records
the requests.

It serves the model information of a revision, the list of its files, and the files: small ones directly,
weights through a redirect to another host, as the hub does. `hub.answer(path, ...)` makes any path fail;
`hub.break_off(...)` ends a transfer halfway.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # names in lower case


class Hub:
    """Serves within a `with` block. `repositories` holds name -> revision -> file -> bytes."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.sizes: dict[
            str, int
        ] = {}  # file -> the size in bytes that the server claims, if it is not the true one
        self.requests: list[Request] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.broken: dict[str, Callable[[BaseHTTPRequestHandler, bytes], None]] = {}

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        options = {"poll_interval": 0.02}  # seconds
        threading.Thread(target=self.server.serve_forever, kwargs=options, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, status: int, code: str = "", message: str = "", body: bytes = b"") -> None:
        """Give this answer to every path that begins with `path`."""
        self.answers[path] = status, {"X-Error-Code": code, "X-Error-Message": message}, body

    def break_off(self, file: str, how: Callable[[BaseHTTPRequestHandler, bytes], None]) -> None:
        """Once, send the first half of a file and then call how(handler, the rest)."""
        self.broken[file] = how

    def fetched(self) -> set[tuple[str, str]]:
        """(revision, file) of each file whose content was requested."""
        revisions = [(name, revision) for name in self.repositories for revision in self.repositories[name]]
        names = {commit(name, revision): revision for name, revision in revisions}
        paths = [r.path for r in self.requests if r.method == "GET"]
        found = (re.fullmatch(r"(?:/cdn)?/[^/]+/[^/]+/resolve/(\w+)/(.+)", path) for path in paths)
        return {(names[m[1]], m[2]) for m in found if m}


def commit(repository: str, revision: str) -> str:
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


def reset(handler: BaseHTTPRequestHandler, rest: bytes) -> None:
    """Lose the connection."""
    # With this option, close() sends a reset.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    close(handler, rest)


def close(handler: BaseHTTPRequestHandler, rest: bytes) -> None:
    """End the connection too early."""
    handler.rfile.close()  # otherwise it would hold the socket open
    handler.connection.close()


def stall(handler: BaseHTTPRequestHandler, rest: bytes) -> None:
    """Send nothing more for a minute."""
    time.sleep(60)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 0

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        sent = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, path, sent))
        for prefix, (status, headers, body) in self.hub.answers.items():
            if path.startswith(prefix):
                return self.reply(status, body, {name: value for name, value in headers.items() if value})
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.information(m[1], m[2] or "main")
        if m := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            return self.tree(m[1], m[2])
        if m := re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*m.groups())
        return self.reply(404, b"")

    def information(self, name: str, revision: str) -> None:
        if (files := self.files(name, revision)) is not None:
            ids = {"_id": "0", "id": name, "modelId": name}
            sha, siblings = (
                commit(name, self.revision(name, revision)),
                [{"rfilename": file} for file in files],
            )
            self.json({**ids, "sha": sha, "private": False, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if (files := self.files(name, revision)) is not None:
            entries = []
            for file, content in files.items():
                oid, size = etag(content), self.size(file, content)
                entry = {"type": "file", "oid": oid[:40], "size": size, "path": file}
                if file.endswith((".safetensors", ".bin")):
                    entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
                entries.append(entry)
            self.json(entries)

    def file(self, cdn: str | None, name: str, revision: str, file: str) -> None:
        files = self.files(name, revision)
        if files is None:
            return
        headers = {"X-Repo-Commit": commit(name, self.revision(name, revision))}
        if file not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", **headers})
        content = files[file]
        headers["ETag"] = f'"{etag(content)}"'
        if file.endswith((".safetensors", ".bin")) and not cdn:
            host = f"http://localhost:{self.server.server_address[1]}"
            linked = {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(self.size(file, content))}
            location = {"Location": f"{host}/cdn/{name}/resolve/{revision}/{file}"}
            return self.reply(302, b"", {**headers, **linked, **location})
        start = 0
        if requested := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(requested[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        broken = self.hub.broken.pop(file, None) if self.command == "GET" else None
        self.reply(206 if start else 200, content[start:], headers, broken)

    def files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision, given by name or commit; None after an error has been sent."""
        if name not in self.hub.repositories:
            # As on the hub, the answer does not tell whether a private repository of this name exists.
            self.fail(401, "RepoNotFound", "Invalid username or password.")
            return None
        if (found := self.revision(name, revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return self.hub.repositories[name][found]

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def revision(self, name: str, revision: str) -> str | None:
        return next((r for r in self.hub.repositories[name] if revision in (r, commit(name, r))), None)

    def size(self, file: str, content: bytes) -> int:
        return self.hub.sizes.get(file, len(content))

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, broken: Callable | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if broken is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True
        broken(self, body[len(body) // 2 :])


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
