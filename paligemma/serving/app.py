"""The HTTP interface as a FastAPI application."""

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ..fields import shown
from ..pipeline import choose_slots, usual_positions
from .engine import Engine
from .errors import Refused, wrong_fields
from .gate import CHAT, GONE, Gate, Traffic
from .metrics import Metrics
from .page import add_page
from .question import read
from .reply import Reply, Service
from .request import ChatRequest
from .response import Completion, ErrorBody, Health, Model, Models
from .settings import NEW_TOKENS, THREADS, Settings
from .text import Piece

if TYPE_CHECKING:
    from ..model import PaliGemma
    from ..processor import Processor

T = TypeVar("T")


ERRORS = {
    400: "A request that is wrong, or asks for what PaliGemma cannot do",
    401: "The API key is missing or wrong",
    404: "The server has another model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not JSON",
    500: "The answer failed",
    503: "Too many requests, or the server is shutting down: try again after Retry-After seconds",
    504: "The answer took too long",
}
FAILED = Refused(500, "the server failed: its log says why", "internal_error")
EVENTS = {"text/event-stream": {"schema": {"type": "string", "description": "Events with a Chunk each."}}}


def create_app(
    model: "PaliGemma", processor: "Processor", name: str, settings: Settings | None = None
) -> FastAPI:
    """The application that answers with a model, under a name. The thread of the engine runs while the
    application does. Raises PaliGemmaError if the memory has no room for `batch_size` rows."""
    settings = settings or Settings()
    engine = Engine(model, settings.batch_size or choose_slots(model, NEW_TOKENS))
    engine.rows.check_memory(usual_positions(model, NEW_TOKENS))
    metrics, traffic, created = Metrics(engine), Traffic(), int(time.time())
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
    writers = ThreadPoolExecutor(THREADS, thread_name_prefix="answers")
    service = Service(engine, processor, threads, writers, settings, metrics)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.stop()
        for pool in (threads, writers):
            pool.shutdown(cancel_futures=True)

    about = "Prompts about pictures, answered by PaliGemma. docs/serve.md describes the server."
    app = FastAPI(
        title="PaliGemma", version="1", description=about, lifespan=running, docs_url=None, redoc_url=None,
        redirect_slashes=False,
        dependencies=[Security(HTTPBearer(auto_error=False))] if settings.api_key else [],
    )  # fmt: skip
    app.state.service, app.state.settings, app.state.traffic = service, settings, traffic
    app.add_middleware(Gate, settings=settings, metrics=metrics, traffic=traffic)
    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": about} for status, about in ERRORS.items()
    }

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return wrong_fields(error.errors()).response

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and error.__cause__:  # of FastAPI, which hides what json has found
            return Refused(400, f"the body is not JSON: {shown(str(error.__cause__))}").response
        message = f"{request.method} {shown(request.url.path)}: {error.detail}; see /openapi.json"
        return Refused(error.status_code, message, headers=error.headers).response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # its traceback is written to stderr
        return FAILED.response

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"model": Health, "description": "It cannot answer"}})
    async def health(response: Response) -> Health:
        """Whether the server can answer."""
        if not engine.alive:
            response.status_code = 503
            return Health(status="failed", error=engine.death or "the engine has not started")
        if traffic.draining:
            response.status_code = 503
            return Health(status="shutting down")
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: errors[401]})
    async def counted() -> Response:
        """What the server has counted, for Prometheus."""
        metrics.open.set(traffic.open)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> Models:
        """The one model of this server."""
        return Models(data=[Model(id=name, created=created)])

    @app.get("/v1/models/{model:path}", responses={401: errors[401], 404: errors[404]})
    async def one_model(model: str) -> Model:
        """The model of this name."""
        check_model(model)
        return Model(id=name, created=created)

    def check_model(asked: str) -> None:
        if asked != name:
            known = f"this server has {shown(name)}"
            raise Refused(404, f"there is no model {shown(asked)}: {known}", "model_not_found", "model")

    ok = {
        200: {
            "model": Completion,
            "content": EVENTS,
            "description": "The answer; a stream of events if asked",
        }
    }
    more = {"4XX": {"model": ErrorBody, "description": "Another mistake of the request"}}

    @app.post(CHAT, responses=ok | errors | more)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a prompt about pictures."""
        check_model(body.model)
        request.state.reply = reply = Reply(service, read(body, settings))  # for the log
        streaming = None
        try:
            await while_connected(request, reply.prepare())
            if not body.stream:
                return JSONResponse(await while_connected(request, whole(reply, body, name)))
            events = stream(reply, body, name)
            streaming = EventStream(reply, await while_connected(request, anext(events)), events)
            return streaming
        finally:
            if streaming is None:
                reply.close()

    add_page(app)
    return app


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Refused(GONE, "the client has gone")
    finally:
        working.cancel()
        watching.cancel()


async def whole(reply: Reply, body: ChatRequest, name: str) -> dict[str, Any]:
    """The answer as a Completion."""
    pieces = [piece async for some in reply.pieces() for piece in some]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
    said, more = await reply.found()
    choice = {"index": 0, "message": message, **ended(body, pieces, reply.finish_reason), **said}
    return {**begun(reply, name, "chat.completion"), "choices": [choice], "usage": reply.usage, **more}


async def stream(reply: Reply, body: ChatRequest, name: str) -> AsyncIterator[str]:
    """The answer as server-sent events."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**begun(reply, name, "chat.completion.chunk"), "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    role = {"role": "assistant"}
    async for pieces in reply.pieces():
        delta = {**role, "content": "".join(piece.text for piece in pieces)}
        yield event([{"index": 0, "delta": delta, **ended(body, pieces, None)}])
        role = {}
    said, more = await reply.found()
    yield event([{"index": 0, "delta": role, **ended(body, [], reply.finish_reason), **said}], **more)
    if body.stream_options and body.stream_options.include_usage:
        yield event([], usage=reply.usage)
    yield "data: [DONE]\n\n"


def begun(reply: Reply, name: str, kind: str) -> dict[str, Any]:
    return {"id": reply.id, "object": kind, "created": reply.created, "model": name}


def ended(body: ChatRequest, pieces: list[Piece], reason: str | None) -> dict[str, Any]:
    """The log-probabilities of pieces, if they are asked for, and why the answer ended."""
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in pieces
    ]
    return {"logprobs": {"content": content} if body.logprobs else None, "finish_reason": reason}


class EventStream(StreamingResponse):
    """Sends the events of a reply, and frees its row however that ends. The first event is known, so that an
    answer that fails before it has a status of its own; a later failure is the last event."""

    def __init__(self, reply: Reply, first: str, rest: AsyncIterator[str]):
        async def events() -> AsyncIterator[str]:
            yield first
            try:
                async for event in rest:
                    yield event
            except Exception as error:
                if not isinstance(error, Refused):
                    traceback.print_exc()
                    error = FAILED
                yield f"data: {json.dumps(error.content)}\n\n"

        super().__init__(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.close()
