"""Runs the application on uvicorn: connections that stall are closed, and a signal ends the server after the
answers that it has begun."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import uvicorn
from fastapi import FastAPI
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..command import tell
from ..errors import PaliGemmaError
from .errors import Refused, busy
from .gate import Traffic

CONNECTIONS = 500  # open ones; the systems' usual limit of files is 1024
LATE = 10  # seconds after the time of a body, in which the application can refuse the request itself
STALLED = 60  # seconds for which a client may read nothing while its answer waits to be sent
CLOSING = 5  # seconds that connections have to close at the end


def listen(host: str, port: int) -> socket.socket:
    """A socket for connections. Raises PaliGemmaError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would allow a second server on the same port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        remedy = "give another --port or --host"
        raise PaliGemmaError(f"--host {host} --port {port} cannot be used ({reason}): {remedy}") from None
    return listening


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer until a signal ends the server."""
    Server(configuration(app), app.state.traffic).run([listening])


def configuration(app: FastAPI) -> uvicorn.Config:
    class Timed(Connection):
        read_timeout = app.state.settings.body_timeout + LATE
        requests = app.state.service.metrics.requests

    return uvicorn.Config(
        app, http=Timed, loop="asyncio", ws="none", lifespan="on", log_config=None, log_level="error",
        access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=CLOSING,
    )  # fmt: skip


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT refuses new requests and ends the server when the others are answered; the
    second ends it at once."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic):
        super().__init__(config)
        self.traffic = traffic

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, before = asyncio.get_running_loop(), {}

        def handle(number: int, frame: object) -> None:
            if self.traffic.draining:
                os._exit(130)
            self.traffic.draining = True
            loop.call_soon_threadsafe(self._drain)

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        begun = self.traffic.open - len(self.traffic.arriving)
        self.traffic.drain()

        async def drained() -> None:
            while self.traffic.open:
                await asyncio.sleep(0.05)
            self.should_exit = True

        tell(f"shutting down, after {begun} requests that are complete")
        self.draining = asyncio.get_running_loop().create_task(drained())


class Connection(H11Protocol):
    """A connection, which is closed if a request is not complete in time, or if the client does not read."""

    read_timeout: float
    requests: Counter
    late: asyncio.TimerHandle | None = None  # runs while a request is incomplete
    stalled: asyncio.TimerHandle | None = None  # runs while the client does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(busy(f"{CONNECTIONS} connections are open: try again later", "busy"))
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the timer with the first byte of a request, and stop it with the last one."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self._stop("late")
        elif self.late is None:
            self.late = self.loop.call_later(self.read_timeout, self._end_late)

    def _end_late(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            late = f"the request was not complete after {self.read_timeout:g} s"
            self._refuse(Refused(408, late, "timeout"))
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.stalled or self.loop.call_later(STALLED, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("stalled")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("late")
        self._stop("stalled")
        super().connection_lost(exc)

    def _stop(self, name: str) -> None:
        if timer := getattr(self, name):
            timer.cancel()
        setattr(self, name, None)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Refused(400, msg))

    def _refuse(self, error: Refused) -> None:
        """Answer without the application, and close the connection."""
        self.requests.labels("other", str(error.status)).inc()
        tell(f"{self.client[0] if self.client else '-'} - other {error.status}: {error.message}")
        reply = error.response
        reply.headers["Connection"] = "close"
        head = "".join(f"{name.decode()}: {value.decode()}\r\n" for name, value in reply.raw_headers)
        self.transport.write(f"HTTP/1.1 {error.status} Refused\r\n{head}\r\n".encode() + bytes(reply.body))
        self.transport.close()
