"""Everything there is to measure on a CUDA machine, in one command of at most nine minutes.

    python -m benchmarks.measure [--out DIR] [--minutes 9] [--only STAGE ...]
    python -m benchmarks.measure --dry-run  # on a CPU, in Triton's interpreter, with tiny shapes: no speed

Stages follow one another, each up to its deadline; what one leaves of its time is the next one's. A stage is
a list of tasks that runs in processes of its own: a task that crashes, hangs or breaks the device costs its
process, is noted as failed, and a new process goes on after it. After every stage the JSON file is replaced.
Compilation comes before correctness because it runs on many cores, and everything after it finds the kernels
on the disk.

Progress goes to stderr, a table to stdout. Exit 0 when every task of every stage ran and passed, 1 otherwise,
2 for wrong usage; of the stages that are open-ended, every task that there was time for. benchmarks/report.py
says what is made of the numbers."""

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import report

LATE = "killed at the stage's deadline"
RESTART = 75  # exit code of a process that did its task and is not to be trusted with another one


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # of the nine minutes; with more or less, all of these change alike
    task_seconds: float  # after which a task counts as hung
    parts: int = 1  # processes that share the tasks
    variables: dict[str, str] = field(default_factory=dict)  # of their environment
    open_ended: bool = (
        False  # it has more tasks than there may be time for, and what it has found by then is what is wanted
    )


PLAN = (  # what tells most comes first, also within a stage
    Stage("environment", 45, 45),  # torch is imported twice, from a disk that a fresh machine has never read
    Stage("ceilings", 15, 15),
    Stage("compilation", 90, 60, parts=max(2, (os.cpu_count() or 2) - 4)),
    Stage("correctness", 50, 30, parts=4),  # it needs no quiet GPU
    Stage("steps", 66, 40),
    Stage("steps_without_pdl", 12, 12, variables={"PALIGEMMA_PDL": "0"}),
    Stage("model", 75, 40, open_ended=True),
    Stage("peers", 116, 110, open_ended=True),
    Stage("kernels", 37, 30, open_ended=True),
    Stage("crossover", 34, 18),
)


def main(argv: list[str] | None = None) -> int:
    start = time.monotonic()
    args = parse_args(argv)
    if args.dry_run:
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        multiprocessing.set_forkserver_preload(["torch"])  # once, and not 2 s for each process
    elif not has_cuda():
        print(
            "this machine has no CUDA GPU that torch can use: nothing was measured (--dry-run runs the same way on a CPU)",
            file=sys.stderr,
        )
        return 1
    out = args.out or (
        Path(tempfile.mkdtemp(prefix="measure-")) if args.dry_run else Path(__file__).parent / "results"
    )
    out.mkdir(parents=True, exist_ok=True)
    version = args.commit or commit()
    if version == "unknown":
        progress(
            "this checkout has no .git: the file will not say which commit was measured (--commit HASH does)"
        )
    stages = [
        stage for stage in PLAN if stage.name == "environment" or not args.only or stage.name in args.only
    ]
    minutes = args.minutes or (
        30 if args.dry_run else 9
    )  # a dry run takes one, and more on a machine that has other work
    scale = 60 * minutes / sum(stage.seconds for stage in stages)
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.measure", *(sys.argv[1:] if argv is None else argv)]).replace(str(args.out), "DIR"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": version, "device": "unknown", "versions": {},
        "dry_run": "on a CPU, in Triton's interpreter, with tiny shapes: its times say nothing" if args.dry_run else False, "minutes": minutes,
        "clocks_before": clocks(), "stages": {},
    }  # fmt: skip
    end, limits = start, {}
    for stage in stages:
        end += scale * stage.seconds
        stage = replace(stage, task_seconds=scale * stage.task_seconds, variables=stage.variables | limits)
        progress(f"{stage.name}: up to {end - time.monotonic():.0f} s")
        results["stages"][stage.name] = found = run_stage(stage, args.dry_run, end)
        if stage.name == "environment" and found["tasks"] and "device" in found["tasks"][0]:
            results |= {key: found["tasks"][0][key] for key in ("device", "versions")}
        if (
            stage.name == "ceilings" and found["status"] == "ok"
        ):  # later stages take these: one denominator for a whole run
            limits = {
                "MEASURED_CEILINGS": json.dumps(
                    {key: x for key, x in found["tasks"][0].items() if key not in ("task", "seconds_taken")}
                )
            }
        results |= {"clocks_after": clocks(), "summary": report.summary(results)}
        save(out, results)
        progress(f"{stage.name}: {found['line']}")
    report.print_table(results)
    print(f"wrote {save(out, results)}" + (": a dry run, its times say nothing" if args.dry_run else ""))
    return int(any(found["status"] != "ok" for found in results["stages"].values()))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in PLAN]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure", description="Measure kernels and model on this machine's GPU."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the JSON file (default: benchmarks/results; for a dry run a temporary one)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="for everything (default: 9, of a dry run 30); stages get their parts of it",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STAGE", help=f"some of {', '.join(names)}"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, with tiny shapes, in Triton's interpreter"
    )
    parser.add_argument("--commit", help="what to note where the checkout has no .git")
    return parser.parse_args(argv)


# One stage, from outside


def run_stage(stage: Stage, dry: bool, end: float) -> dict[str, Any]:
    """Its status: ok, short (the time was over before every task had run) or failed; and what its tasks
    found."""
    start, parts = time.monotonic(), min(stage.parts, 2) if dry else stage.parts
    with tempfile.TemporaryDirectory(prefix="measure-") as scratch, ThreadPoolExecutor(parts) as pool:
        supervisors = [
            Supervisor(stage, dry, end, part, parts, Path(scratch) / f"{part}.jsonl") for part in range(parts)
        ]
        try:
            notes = [note for note in pool.map(Supervisor.run, supervisors) if note]
        except KeyboardInterrupt:
            for supervisor in supervisors:
                supervisor.end = 0.0
            raise
        records = [record for supervisor in supervisors for record in read_records(supervisor.file)]
    planned = {name for record in records for name in record.get("planned", ())}
    tasks = [record for record in records if "seconds_taken" in record]
    failed = [record["task"] for record in tasks if "failed" in record]
    missing = len(planned - {record["task"] for record in tasks})
    status = (
        "failed"
        if failed or notes
        else "short"
        if (missing and not stage.open_ended) or not planned
        else "ok"
    )
    line = f"{status}, {len(tasks)} of {len(planned)} tasks in {time.monotonic() - start:.0f} s"
    line += (
        f"; out of time for {missing}" * bool(missing)
        + f"; {len(failed)} failed" * bool(failed)
        + "".join(f"; {note}" for note in dict.fromkeys(notes))
    )
    return {"status": status, "line": line, "tasks": tasks}


class Supervisor:
    """Runs one part of a stage's tasks in child processes, one after another, until all have run or the time
    is over."""

    def __init__(self, stage: Stage, dry: bool, end: float, part: int, parts: int, file: Path):
        self.stage, self.dry, self.end, self.part, self.parts, self.file = stage, dry, end, part, parts, file
        file.touch()

    def run(self) -> str | None:
        """What went wrong with the stage itself, if anything did."""
        while True:
            before = len(read_records(self.file))
            why = self.run_child()
            records = read_records(self.file)
            if why is None:  # every task has run, or the child found no time for the next
                return None
            running = self.running(records)
            if running:
                late = self.stage.open_ended and why == LATE
                self.note({"task": running, "error" if late else "failed": why, "seconds_taken": 0.0})
            elif why != f"exit code {RESTART}":
                return why
            if time.monotonic() > self.end or len(read_records(self.file)) == before:
                return None

    def run_child(self) -> str | None:
        """None when it ended well; else why it did not."""
        done = {record["task"] for record in read_records(self.file) if "seconds_taken" in record}
        context = (
            multiprocessing.get_context("forkserver") if self.dry else multiprocessing.get_context("spawn")
        )
        process = context.Process(
            target=run_tasks,
            args=(self.stage, self.dry, done, self.part, self.parts, self.end, str(self.file)),
        )
        process.start()
        seen, since = None, time.monotonic()
        while process.is_alive():
            process.join(0.1)
            running = self.running(read_records(self.file))
            if running != seen:
                seen, since = running, time.monotonic()
            if time.monotonic() > self.end + 1:
                return self.kill(process, LATE)
            if seen and time.monotonic() - since > self.stage.task_seconds:
                return self.kill(process, f"killed: it hung for {self.stage.task_seconds:.0f} s")
        if process.exitcode == 0:
            return None
        return (
            f"exit code {process.exitcode}"
            if (process.exitcode or 0) > 0
            else f"died of signal {-(process.exitcode or 0)}"
        )

    def kill(self, process: Any, why: str) -> str:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
        except ProcessLookupError:
            process.kill()  # it was not yet the head of its group
        process.join(5)
        return why

    def running(self, records: list[dict]) -> str | None:
        started = next((record["started"] for record in reversed(records) if "started" in record), None)
        return started if started not in {record.get("task") for record in records} else None

    def note(self, record: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_records(file: Path) -> list[dict]:
    """The whole lines; a process that was killed may leave a part of one."""
    lines = file.read_text().split("\n")[:-1]
    return [
        json.loads(line, parse_constant=str) for line in lines if line.endswith("}")
    ]  # NaN is no JSON: "NaN" is


# One stage, from inside


def run_tasks(stage: Stage, dry: bool, done: set[str], part: int, parts: int, end: float, file: str) -> None:
    """In a process of its own: run this part's tasks but those that are done, and write a line before and
    after each."""
    os.setpgrp()  # what it starts dies with it
    os.dup2(2, 1)  # stdout is for the table
    os.environ.update(stage.variables)  # before anything is imported that reads them
    if parts > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are parallel enough
    import torch

    from benchmarks import stages, timing

    if dry:
        sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
        importlib.import_module("interpreter").install()  # right in bfloat16
    torch.set_grad_enabled(False)
    with open(file, "a", buffering=1) as out:

        def write(record: dict) -> None:
            out.write(json.dumps(record) + "\n")

        tasks = stages.tasks(stage.name, dry)[part::parts]
        write({"planned": [name for name, _ in tasks]})
        for name, task in tasks:
            if name in done:
                continue
            if time.monotonic() > end:
                break
            write({"started": name})
            start, broken = time.monotonic(), False
            try:
                found = task()
            except Exception as error:
                found, broken = {"failed": timing.one_line(error)}, timing.is_fatal(error)
            write({"task": name, **found, "seconds_taken": time.monotonic() - start})
            progress(f"  {name}" + (f": {found['failed']}" if "failed" in found else ""))
            if broken or timing.failed_captures:
                os._exit(RESTART)
            gc.collect()  # models that nobody needs any more
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    os._exit(0)  # an orderly end could hang in the driver; every line is written


# What surrounds it


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def save(out: Path, results: dict[str, Any]) -> Path:
    """Into the file's place at once, so that it is whole whenever this command is stopped."""
    device = re.sub(r"[^a-z0-9]+", "-", str(results["device"]).lower()).strip("-")
    path = out / f"measure-{device}-{results['date'][:10]}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
    return path


def clocks() -> str:
    """The driver, the clocks (MHz), the power (W) and the temperature (C) as nvidia-smi has them, or why it
    has not."""
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
