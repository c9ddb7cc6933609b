"""What every request passes before the application: the API key, the size and the time of its body. Each
request is counted, and is one line on stderr."""

import asyncio
import hmac
import ipaddress
import re
import time
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..command import tell
from ..fields import shown
from .errors import Refused, busy
from .metrics import Metrics
from .settings import Settings

CHAT = "/v1/chat/completions"
PATHS = ("/", "/health", "/metrics", "/openapi.json", "/v1/models", CHAT)  # others are logged as "other"
QUIET = ("/health", "/metrics", "page")  # asked so often that only failures are worth a line
BODIES = 16  # bodies of the largest size that are held at once; usual ones are a hundred times smaller
VALUES = 20_000  # in the JSON of a body, about; a usual request has fewer than a hundred
ENDING = busy("the server is shutting down: send it to another one", "shutting_down")
GONE = 499  # the status, in the log and the metrics, of a client that has gone


def is_local(host: str) -> bool:
    """Whether a Host header, with or without a port, is localhost or a loopback address."""
    name = re.sub(r":\d*$", "", host).lower()
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass
class Traffic:
    open: int = 0  # chat completions that have not ended
    held: int = 0  # bytes of their bodies
    arriving: set[asyncio.Timeout] = field(default_factory=set)  # of bodies that are not complete
    draining: bool = False  # whether new ones are refused, because the server is about to end

    def drain(self) -> None:
        """Refuse what is not complete."""
        self.draining = True
        for timeout in self.arriving:
            if not timeout.expired():
                timeout.reschedule(0)


class Gate:
    """The ASGI application around another one."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, traffic: Traffic):
        self.app, self.settings, self.metrics, self.traffic = app, settings, metrics, traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, path = time.perf_counter(), GONE, scope["path"]
        path = "/v1/models" if path.startswith("/v1/models/") else path
        name = path if path in PATHS else "page" if path.startswith("/page/") else "other"
        state = scope.setdefault("state", {})

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                if path == CHAT and scope["method"] == "POST":
                    await self._chat(scope, receive, noted)
                else:
                    await self.app(scope, receive, noted)
            except Refused as error:
                await error.response(scope, receive, noted)
        except BaseException:
            status = 500 if status == GONE else status
            raise
        finally:
            seconds = time.perf_counter() - started
            self.metrics.requests.labels(name, str(status)).inc()
            self.metrics.seconds.labels(name).observe(seconds)
            if name not in QUIET or status >= 400:
                client, note = (scope.get("client") or ("-",))[0], getattr(state.get("reply"), "note", "")
                line = f"{client} {scope['method'][:10]} {name} {status} in {seconds:.3f} s"
                tell(f"{line}: {note}" if note else line)

    def _check(self, scope: Scope) -> None:
        """Raise Refused without the API key. /health, the page and openapi.json need none. A server without
        a key that only this machine reaches answers only to its own names: a web page can give its own name
        the address 127.0.0.1, and the browser then lets it read what the server answers."""
        key, path, headers = self.settings.api_key, scope["path"], dict(scope["headers"])
        if key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if self.settings.local_only and not is_local(host):
                remedy = "use localhost or 127.0.0.1, or start the server with --api-key-file"
                raise Refused(403, f"the Host {shown(host)} is not this machine: {remedy}", "wrong_host")
            return
        if not (path.startswith("/v1/") or path == "/metrics"):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            remedy = "send the header Authorization: Bearer KEY with the server's API key"
            asked = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, f"the API key is missing or wrong: {remedy}", "invalid_api_key", headers=asked)

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.traffic.draining:
            raise ENDING
        self.traffic.open += 1
        size = 0
        try:
            body = await self._body(scope, receive)
            if body is None:
                return
            size = len(body)
            if (values := sum(body.count(sign) for sign in b",[{")) > VALUES:  # each takes memory and time
                problem = f"the body has about {values:,} values, and {VALUES:,} are the most"
                raise Refused(400, f"{problem}: send one message with text and pictures", "too_large")
            messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
            del body

            async def replay() -> Message:
                return messages.pop() if messages else await receive()

            await self.app(scope, replay, send)
        finally:
            self.traffic.open -= 1
            self.traffic.held -= size

    async def _body(self, scope: Scope, receive: Receive) -> bytearray | None:
        """The whole body, which is counted in `held`; None if the client goes before its end. Raises
        Refused."""
        headers, settings = dict(scope["headers"]), self.settings
        types = [value for name, value in scope["headers"] if name == b"content-type"]
        if [kind.partition(b";")[0].strip().lower() for kind in types] != [b"application/json"]:
            raise Refused(415, "the one Content-Type must be application/json", "unsupported_media_type")
        too_large = f"the body has more than {settings.max_body:,} bytes: send smaller pictures"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > settings.max_body:
            raise Refused(413, too_large, "too_large")
        body, kept, timeout = bytearray(), False, None
        try:
            async with asyncio.timeout(settings.body_timeout) as timeout:
                self.traffic.arriving.add(timeout)
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    if len(body) + len(part) > settings.max_body:
                        raise Refused(413, too_large, "too_large")
                    if self.traffic.held + len(part) > BODIES * settings.max_body:
                        raise busy("too many large requests are in work: send it again later", "busy")
                    body += part
                    self.traffic.held += len(part)
                    more = message.get("more_body", False)
            kept = True
            return body
        except TimeoutError:
            if self.traffic.draining:
                raise ENDING from None
            late = f"the body was not complete after {settings.body_timeout:g} s"
            raise Refused(408, late, "timeout", headers={"Connection": "close"}) from None
        finally:
            if timeout:
                self.traffic.arriving.discard(timeout)
            if not kept:
                self.traffic.held -= len(body)
