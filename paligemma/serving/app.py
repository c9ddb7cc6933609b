"""The HTTP interface as a FastAPI application."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from ..fields import shown
from ..pipeline import choose_slots
from . import response
from .engine import Engine
from .errors import Refused, wrong_fields
from .page import add_page
from .question import read
from .reply import Reply, Service
from .request import ChatRequest
from .settings import NEW_TOKENS, THREADS, Settings
from .text import Piece

if TYPE_CHECKING:
    from ..model import PaliGemma
    from ..processor import Processor

T = TypeVar("T")


def create_app(
    model: "PaliGemma", processor: "Processor", name: str, settings: Settings = Settings()
) -> FastAPI:
    """The application that answers with a model under a name. The engine's thread runs while the application
    does."""
    slots = settings.batch_size or choose_slots(model, NEW_TOKENS)
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")
    service = Service(Engine(model, slots), processor, threads, settings)
    created = int(time.time())

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.stop()
        threads.shutdown(cancel_futures=True)

    app = FastAPI(title="PaliGemma", lifespan=running, redoc_url=None)
    app.state.service = service

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        return wrong_fields(error.errors()).response

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, str(error.detail), headers=error.headers).response

    @app.get("/health")
    async def health() -> response.Health:
        return response.Health(status="ok")

    @app.get("/v1/models")
    async def models() -> response.Models:
        return response.Models(data=[response.Model(id=name, created=created)])

    @app.post("/v1/chat/completions", response_model=response.Completion)
    async def chat(body: ChatRequest, request: Request) -> Any:
        if body.model != name:
            known = f"this server has {shown(name)}"
            raise Refused(404, f"there is no model {shown(body.model)}: {known}", "model_not_found", "model")
        reply = Reply(service, read(body, settings))
        try:
            if body.stream:
                chunks = stream(reply, body, name)
                first = await while_connected(request, anext(chunks))
                return EventStream(reply, first, chunks)
            return await while_connected(request, whole(reply, body, name))
        finally:
            if not body.stream:
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
        raise Refused(499, "the client has gone")
    finally:
        working.cancel()
        watching.cancel()


async def whole(reply: Reply, body: ChatRequest, name: str) -> dict[str, Any]:
    await reply.prepare()
    pieces = [piece async for some in reply.pieces() for piece in some]
    message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
    said, more = await reply.found()
    choice = {"index": 0, "message": message, **ended(body, pieces, reply.finish_reason), **said}
    return {**begun(reply, name, "chat.completion"), "choices": [choice], "usage": reply.usage, **more}


async def stream(reply: Reply, body: ChatRequest, name: str) -> AsyncIterator[str]:
    """The answer as server-sent events. The first comes with the first token, so that what fails before has
    a status of its own."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        chunk = {**begun(reply, name, "chat.completion.chunk"), "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    role = {"role": "assistant"}
    await reply.prepare()
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
    """Sends the events of a reply, and frees its row however that ends."""

    def __init__(self, reply: Reply, first: str, rest: AsyncIterator[str]):
        async def events() -> AsyncIterator[str]:
            yield first
            try:
                async for event in rest:
                    yield event
            except Refused as error:
                yield f"data: {json.dumps(error.content)}\n\n"

        super().__init__(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.reply = reply

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.close()
