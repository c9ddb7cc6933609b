"""Servers for tests: a process of its own, or a thread of this one in which a test can make things fail."""

import base64
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from command_line import ROOT, environment, wait_for

from paligemma.serving import server
from paligemma.serving.app import create_app
from paligemma.serving.settings import Settings

LONG = {"temperature": 1000.0, "max_tokens": 120, "seed": 1}  # random tokens, so that no answer ends early
CHAT = "/v1/chat/completions"
# One client, because each prepares TLS for 50 ms; and a connection for each request, because servers end.
HTTP = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


class Process:
    """`python -m paligemma.serve --model demo`, whose stderr is a file."""

    def __init__(self, stderr: Path, *args: object, **env: object):
        self.file = stderr
        command = [sys.executable, "-m", "paligemma.serve", "--model", "demo", "--port", "0", *map(str, args)]
        with stderr.open("wb") as file:
            self.running = subprocess.Popen(command, cwd=ROOT, env=environment(**env), stderr=file)
        self.address = ""
        wait_for(self._answers)

    def _answers(self) -> bool:
        assert self.running.poll() is None, self.stderr
        found = re.findall(r"^(http\S+) answers", self.stderr, re.MULTILINE)
        self.address = found[0] if found else ""
        return bool(found)

    @property
    def stderr(self) -> str:
        return self.file.read_text()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception) -> None:
        self.running.kill()
        self.running.wait()


@contextmanager
def thread(model, processor, **settings) -> Iterator[tuple[str, object]]:
    """The address of a server in a thread, and its application."""
    app = create_app(model, processor, "demo", Settings(**settings))
    listening = server.listen("127.0.0.1", 0)
    running = uvicorn.Server(server.configuration(app))
    worker = threading.Thread(target=running.run, args=([listening],))
    worker.start()
    try:
        wait_for(lambda: running.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app
    finally:
        running.should_exit = True
        worker.join()


def data_url(picture: Path | bytes) -> str:
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def body(prompt: str, *pictures: Path | bytes | str, **options) -> dict:
    urls = [picture if isinstance(picture, str) else data_url(picture) for picture in pictures]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [{"type": "text", "text": prompt}, *parts]}
    return {"model": "demo", "messages": [message], **options}


def counted(address: str, name: str) -> float:
    """A value of /metrics."""
    text = HTTP.get(f"{address}/metrics").text
    return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def raw(address: str) -> socket.socket:
    """An open connection."""
    return socket.create_connection(place(address), timeout=60)


def place(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("http://").split(":")
    return host, int(port)


def head(length: int, *more: str) -> bytes:
    """The head of a request with a body of this length."""
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def events(lines: Iterator[str]) -> list[dict]:
    """The events of a stream, whose last line must be [DONE]."""
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]", found[-1]
    return [json.loads(event) for event in found[:-1]]
