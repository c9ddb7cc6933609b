"""The thread that owns the model: it decodes the rows of all requests together. A request joins at the next
step, and leaves when its answer has ended or its client has gone."""

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import PaliGemmaError
from ..options import Sampling
from ..row import Row
from ..rows import Rows

if TYPE_CHECKING:
    from ..model import PaliGemma


class Event(NamedTuple):
    """What a step has added to a row."""

    tokens: list[int]
    log_probs: list[float]
    finish_reason: str | None  # as Row.finish_reason
    error: str


Receive = Callable[[Event], None]  # called in the engine's thread; it must not wait


class Engine:
    """Answers inputs with `slots` rows. All methods are for any thread."""

    def __init__(self, model: "PaliGemma", slots: int):
        self.model, self.slots, self.rows = model, slots, Rows(model, slots)
        self.receivers: dict[Row, tuple[Receive, int]] = {}  # and how many tokens each has got
        self.changed = threading.Condition()
        self.stopping, self.death = False, ""  # death: why the thread has ended, if it failed
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread after its current step. Rows that have not ended are cancelled."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        self.thread.join()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive() and not self.death

    @property
    def running(self) -> int:
        """The rows that are decoded."""
        return self.slots - self.rows.live.count(None)

    @property
    def waiting(self) -> int:
        """The inputs that wait for a free row."""
        return len(self.rows.waiting)

    def submit(self, inputs: Mapping[str, Any], count: int, sampling: Sampling, receive: Receive) -> Row:
        """Add an input. `receive` gets its tokens, and at last its finish_reason. Raises PaliGemmaError as
        Rows.submit does, and if the engine has ended."""
        with self.changed:
            if self.death or self.stopping:
                raise PaliGemmaError(f"the engine has ended: {self.death or 'the server is shut down'}")
            row = self.rows.submit(None, inputs, count, sampling)
            self.receivers[row] = receive, 0
            self.changed.notify()
        return row

    def cancel(self, row: Row) -> None:
        """End a row early. The next step frees its slot."""
        with self.changed:
            self.rows.cancel(row)
            self.changed.notify()

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.stopping or self.rows.busy)
                    if self.stopping:
                        break
                self._step()
        except BaseException as error:
            self.death = _described(error)
            raise
        finally:
            with self.changed:
                reason = self.death or "the server is shut down"
                for row in list(self.receivers):
                    self._tell(row, "error", f"the engine has ended: {reason}")

    def _step(self) -> None:
        try:
            changed = self.rows.step()
        except Exception as error:
            self._recover(error)
            return
        with self.changed:  # `submit` registers the receiver of a row that a step may have begun already
            for row in changed:
                self._tell(row, row.finish_reason, row.error)

    def _recover(self, error: Exception) -> None:
        """Go on after a failed step. If the prefill of a row failed, that row ends; the others are unchanged.
        Otherwise all rows that are decoded end, and those that wait go to new slots."""
        message, old = _described(error), self.rows
        with self.changed:
            begun = [r for r in self.receivers if r.inputs is not None and r not in old.waiting]
            if not begun:
                self.rows = Rows(self.model, self.slots)
                self.rows.waiting.extend(old.waiting)
            for row in begun or [row for row in self.receivers if row not in old.waiting]:
                self._tell(row, "error", message)

    def _tell(self, row: Row, finish_reason: str | None, error: str) -> None:
        """Hand the new tokens of a row to its receiver."""
        if row not in self.receivers:
            return
        receive, told = self.receivers[row]
        if finish_reason:
            del self.receivers[row]
        else:
            self.receivers[row] = receive, len(row.tokens)
        receive(Event(row.tokens[told:], row.log_probs[told:], finish_reason, error))


def _described(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).splitlines() or [type(error).__name__]
    return "out of memory" if isinstance(error, MemoryError) else lines[0]
