"""One contender in a process of its own: loads it, says so, and answers timed requests.

    python -m benchmarks.peers.worker JOB      JOB: the fields of Job as JSON

It writes one line of JSON after loading, and one for each request that it reads from stdin. What an engine
prints goes to stderr. Besides the engine, it needs only NumPy: its Python may be of an environment that this
package is not installed in."""

import ctypes
import importlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

Step = Callable[[list[int]], None]  # called after each token, with the ids of all rows


class Request(NamedTuple):
    """One generation."""

    rows: int
    new: int  # tokens of each row
    length: int | None  # from so many ids of the text; None: from the image and the prompt


class Job(NamedTuple):
    """What a worker loads."""

    module: str  # of benchmarks.peers.engines
    engine: str
    weights: str
    model: str  # the directory of the checkpoint
    files: str  # the directory of the files that the engine made from it
    inputs: str  # .npz: input_ids, text_ids (1, T), pixel_values (1, 3, S, S), picture (S, S, 3) uint8
    rows: int  # the most rows of a request
    new: int  # the most new tokens of a request

    def arrays(self) -> dict[str, Any]:
        import numpy as np

        return dict(np.load(self.inputs))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints must not be taken for an answer
    with suppress(AttributeError, OSError):  # PR_SET_PDEATHSIG, on Linux: ends with the process that asks
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    job = Job(**json.loads(sys.argv[1]))
    engine = importlib.import_module(job.module)
    if sys.argv[2:] == ["--prepare"]:
        start = time.perf_counter()
        engine.prepare(job)
        answers.write(json.dumps({"prepare_s": time.perf_counter() - start}) + "\n")
        return
    for name in getattr(engine, "IMPORTS", ()):  # the time of loading does not include that of importing
        importlib.import_module(name)
    start = time.perf_counter()
    run = engine.load(job)
    answers.write(json.dumps({"load_s": time.perf_counter() - start}) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(timed(run, Request(**json.loads(line)))) + "\n")


def timed(run: Callable[[Request, Step], None], request: Request) -> dict[str, Any]:
    """The seconds to the first token, and the median of the milliseconds between tokens (None for one)."""
    tokens: list[list[int]] = []
    times = [time.perf_counter()]

    def step(ids: list[int]) -> None:
        times.append(time.perf_counter())
        tokens.append([int(x) for x in ids])

    run(request, step)
    if [len(ids) for ids in tokens] != [request.rows] * request.new:
        raise RuntimeError(f"{len(tokens)} steps instead of {request.new}, of {request.rows} rows")
    gaps = [1e3 * (b - a) for a, b in pairwise(times[1:])]
    ms = statistics.median(gaps) if gaps else None
    return {"first_s": times[1] - times[0], "step_ms": ms, "tokens": [ids[0] for ids in tokens]}


if __name__ == "__main__":
    main()
