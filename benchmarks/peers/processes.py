"""The worker processes of the contenders: started, asked with a deadline, stopped between turns, and ended to
make room for the next one."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from paligemma.machine import free_memory

from .worker import Job, Request

ROOT = Path(__file__).parent.parent.parent
SPARE = 1 << 30  # bytes of memory that stay free


class Failed(Exception):
    """A contender crashed, hung or does not fit; the message says which, in one line."""


class Worker:
    """One contender in a process of its own, with all processes that it starts."""

    def __init__(
        self, python: str, prefix: Path, job: Job, log: Path, deadline: float, prepare: bool = False
    ):
        self.deadline, self.log, self.peak = deadline, log, 0
        command = [python, "-m", "benchmarks.peers.worker", json.dumps(job._asdict())]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        if job.engine == "vllm" and (openmp := next(prefix.rglob("libiomp5.so"), None)):
            preloaded = f"{openmp}:{environment.get('LD_PRELOAD', '')}".rstrip(":")
            environment["LD_PRELOAD"] = preloaded  # as vLLM's documentation asks
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                command + ["--prepare"] * prepare, cwd=ROOT, env=environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0,
            )  # fmt: skip
        self.pending = b""
        try:
            self.loaded = self.answer()
        except BaseException:
            self.end()
            raise

    def ask(self, request: Request) -> dict[str, Any]:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended: answer() says so
            self.process.stdin.write(json.dumps(request._asdict()).encode() + b"\n")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line of the worker. Raises Failed if there is none before the deadline."""
        stdout: IO[bytes] | None = self.process.stdout
        assert stdout
        end = time.monotonic() + self.deadline
        while b"\n" not in self.pending:
            ready = select.select([stdout], [], [], max(0, min(1, end - time.monotonic())))[0]
            self.peak = max(self.peak, self.memory())
            part = os.read(stdout.fileno(), 1 << 16) if ready else None
            if part == b"":
                code = self.process.wait()
                self.end()  # what it started may still run
                ended = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
                raise Failed(f"{ended}: {self.last_words()}")
            self.pending += part or b""
            if part is None and time.monotonic() >= end:
                self.end()
                raise Failed(f"killed: no answer for {self.deadline:.0f} s")
        line, _, self.pending = self.pending.partition(b"\n")
        return json.loads(line)

    def memory(self) -> int:
        """The sum of the peaks of the resident memory of its processes, mapped files included, in bytes."""
        return sum(peak_memory(process) for process in session(self.process.pid))

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if line), "no message")

    def stop(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()

    def signal(self, number: int) -> None:
        for process in session(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)


class Workers:
    """The workers that are loaded. Those that are not asked are stopped, so that they use no CPU. To load
    another one, those that were asked longest ago are ended until there is room."""

    def __init__(self):
        self.loaded: dict[str, Worker] = {}  # the one that was asked last is last
        self.evicted: set[str] = set()

    def take(self, name: str) -> Worker | None:
        """The worker of a contender, running; None if it must be started."""
        worker = self.loaded.pop(name, None)
        if worker:
            self.loaded[name] = worker
            worker.resume()
        return worker

    def make_room(self, size: float) -> None:
        """End workers until `size` bytes are free. Raises Failed if too little is free after the last one."""
        while (free := free_memory()) < size + SPARE:
            if not self.loaded:
                need = f"needs about {(size + SPARE) / 1e9:.1f} GB of memory"
                raise Failed(f"{need}, and {free / 1e9:.1f} GB are free")
            first = next(iter(self.loaded))
            print(f"no room beside {first}: its process ends", file=sys.stderr)
            self.evicted.add(first)
            self.loaded.pop(first).end()

    def end(self) -> None:
        while self.loaded:
            self.loaded.popitem()[1].end()


def session(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # the name before may hold anything
            if int(fields[3]) == leader:
                found.append(int(path.parent.name))
    return found


def peak_memory(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0
