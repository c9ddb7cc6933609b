"""The answer to one request while it is made: pieces of text as they come, then the objects."""

import asyncio
import base64
import io
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from ..answers.objects import Object
from ..answers.record import described, faults
from ..errors import PaliGemmaError
from .engine import Engine, Event
from .errors import Refused, busy
from .metrics import Metrics
from .question import Question, prepare
from .settings import Settings
from .text import Piece, StoppedText

if TYPE_CHECKING:
    from ..processor import Processor
    from ..row import Row

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """What answers requests."""

    engine: Engine
    processor: "Processor"
    threads: Executor  # read pictures
    writers: Executor  # read answers and write masks, which so do not wait for the pictures of others
    settings: Settings
    metrics: Metrics
    replies: set["Reply"] = field(default_factory=set)  # that have not ended


class Reply:
    """`prepare` reads the pictures and adds the row, `pieces` yields the text, and `found` gives the objects.
    `close` frees the row, whatever the state of the answer is. All are for the event loop.

    Raises Refused: 400 for a wrong picture, 500 for an answer that failed, 503 if too many others wait, 504
    after `settings.timeout`."""

    def __init__(self, service: Service, question: Question):
        most = service.engine.slots + service.settings.queue
        if len(service.replies) >= most:
            raise busy(f"{most} requests are in work or wait: send it again later", "busy")
        service.replies.add(self)
        self.service, self.question = service, question
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.started = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + service.settings.timeout
        self.first_at = self.ended_at = 0.0
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.text = StoppedText(service.processor.text_stream(), question.stops)
        self.row: Row | None = None
        self.reading: Future[None] | None = None  # in a thread; a closed reply counts until it has ended
        self.closed = False
        self.finish_reason = ""
        self.tokens: list[int] = []
        self.log_probs: list[float] = []
        self.size = (0, 0)

    async def prepare(self) -> None:
        service, loop = self.service, asyncio.get_running_loop()

        def call(function: Callable[..., None], *args: Any) -> None:  # from another thread
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(function, *args)

        def work() -> None:
            inputs, self.size = prepare(self.question, service.processor, service.settings)
            if self.closed:
                return
            try:
                count, sampling = self.question.count, self.question.sampling
                self.row = service.engine.submit(
                    inputs, count, sampling, partial(call, self.events.put_nowait)
                )
            except PaliGemmaError as error:  # the answer could exceed the context
                if not service.engine.alive:
                    raise Refused(503, str(error), "engine_ended") from None
                problem = str(error).replace("max_new_tokens", "max_tokens")
                raise Refused(400, problem, "context_length_exceeded", "max_tokens") from None
            if self.closed:
                service.engine.cancel(self.row)

        self.reading = service.threads.submit(work)
        self.reading.add_done_callback(lambda _: call(self._leave))
        await self._timely(asyncio.wrap_future(self.reading))

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces of the answer, each as soon as it is certain that no stop text begins in it."""
        while not self.finish_reason:
            event = await self._timely(self.events.get())
            if event.finish_reason == "error":
                raise Refused(500, f"the answer failed: {event.error}", "answer_failed")
            self.first_at = self.first_at or time.perf_counter()
            ended = event.finish_reason in ("stop", "length")
            self.tokens += event.tokens
            self.log_probs += event.log_probs
            pieces = self.text.push(event.tokens, event.log_probs, ended)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif ended:
                self.finish_reason = event.finish_reason or ""
            if self.finish_reason:
                self.ended_at = time.perf_counter()
                self.close()
            if pieces:
                yield pieces

    async def _timely(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self.deadline):
                return await work
        except TimeoutError:
            limit = f"the answer took longer than {self.service.settings.timeout:g} s"
            raise Refused(504, f"{limit}: ask for fewer tokens, or send it again later", "timeout") from None

    def _leave(self) -> None:
        if self.closed and (self.reading is None or self.reading.done()):
            self.service.replies.discard(self)

    def close(self) -> None:
        if not self.closed and self.first_at:
            counted, used = self.service.metrics, self.usage
            counted.first_token.observe(self.first_at - self.started)
            counted.prompt_tokens.inc(used["prompt_tokens"])
            counted.new_tokens.inc(used["completion_tokens"])
            counted.pictures.inc(len(self.question.pictures))
        self.closed = True
        self._leave()
        if self.row is not None:
            self.service.engine.cancel(self.row)

    async def found(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the choice and what the whole response say of the answer: its objects, and the times."""
        kept, service = self.text.count, self.service
        ids, log_probs = self.tokens[:kept], self.log_probs[:kept]

        def work() -> dict[str, Any]:
            decoder = service.settings.mask_decoder
            answer = service.processor.parse(ids, self.size, log_probs, mask_decoder=decoder)
            objects = [described(o) | {"mask": mask_url(o)} for o in answer.objects]
            return {"objects": objects, "faults": faults(answer)}

        said = await asyncio.get_running_loop().run_in_executor(service.writers, work)
        width, height = self.size
        return said, {"image_size": {"width": width, "height": height}, "timings": self.timings}

    @property
    def note(self) -> str:
        """The answer in a line of the log, without its content."""
        told = (
            f"{len(self.question.pictures)} pictures, {self.usage['prompt_tokens']}+{len(self.tokens)} tokens"
        )
        first = f", first after {self.first_at - self.started:.3f} s" if self.first_at else ""
        return f"{told}{first}, {self.finish_reason or 'not finished'}"

    @property
    def usage(self) -> dict[str, int]:
        read, new = self.row.length if self.row else 0, len(self.tokens)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    @property
    def timings(self) -> dict[str, Any]:
        new, seconds = len(self.tokens), self.ended_at - self.first_at
        times = {"first_token_s": self.first_at - self.started, "total_s": self.ended_at - self.started}
        rate = round((new - 1) / seconds, 2) if new > 1 and seconds > 0 else None
        return {k: round(v, 4) for k, v in times.items()} | {"new_tokens": new, "tokens_per_s": rate}


def mask_url(o: Object) -> str | None:
    """The mask of an object as the data URL of a PNG."""
    mask, file = o.mask, io.BytesIO()
    if mask is None:
        return None
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
