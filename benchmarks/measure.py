"""Measures kernels and model on a machine with a CUDA GPU, in one command of at most nine minutes.

    python -m benchmarks.measure [--out DIR] [--minutes 9] [--only STAGE ...]
    python -m benchmarks.measure --dry-run  # on a CPU, in Triton's interpreter, with tiny shapes: no speed

Stages run one after another, each until its deadline; the next stage gets the time that a stage does not use.
A stage is a list of tasks that run in processes of their own: a task that crashes, hangs or breaks the device
ends its process and is recorded as failed, and a new process continues after it. The JSON file is replaced
after every stage. Compilation comes before correctness because it runs on many cores, and every later stage
finds the kernels on the disk.

Progress goes to stderr, a table to stdout. The exit code is 0 if every task of every stage ran and passed (in
an open-ended stage: every task for which there was time), 2 for wrong usage, and 1 otherwise.
benchmarks/report.py turns the numbers into the targets and the tables."""

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
RESTART = 75  # exit code of a process that finished its task, but whose CUDA context may be broken


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float  # its part of the nine minutes; --minutes scales the times of all stages alike
    task_seconds: float  # after these a task counts as hung
    parts: int = 1  # processes that share the tasks
    variables: dict[str, str] = field(default_factory=dict)  # of the environment of the processes
    open_ended: bool = False  # it may run out of time before its last task without counting as failed


PLAN = (  # the most informative first, also within a stage
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
        multiprocessing.set_forkserver_preload(["torch"])  # imports it once, instead of 2 s for each process
    elif not has_cuda():
        progress("torch finds no CUDA GPU, so nothing was measured (--dry-run runs the same stages on a CPU)")
        return 1
    default = Path(tempfile.mkdtemp(prefix="measure-")) if args.dry_run else Path(__file__).parent / "results"
    out = args.out or default
    out.mkdir(parents=True, exist_ok=True)
    version = args.commit or commit()
    if version == "unknown":
        progress("this checkout has no .git: the file will not name the measured commit; use --commit HASH")
    stages = [stage for stage in PLAN if not args.only or stage.name in ("environment", *args.only)]
    # A dry run takes one minute, and more on a machine that has other work.
    minutes = args.minutes or (30 if args.dry_run else 9)
    scale = 60 * minutes / sum(stage.seconds for stage in stages)
    command = " ".join(["python -m benchmarks.measure", *(sys.argv[1:] if argv is None else argv)])
    dry = "on a CPU, in Triton's interpreter, with tiny shapes: its times mean nothing"
    results: dict[str, Any] = {
        "command": command.replace(str(args.out), "DIR"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": version,
        "device": "unknown", "versions": {}, "dry_run": dry if args.dry_run else False, "minutes": minutes,
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
        if stage.name == "ceilings" and found["status"] == "ok":  # later stages use the same ceilings
            measured = {k: x for k, x in found["tasks"][0].items() if k not in ("task", "seconds_taken")}
            limits = {"MEASURED_CEILINGS": json.dumps(measured)}
        results |= {"clocks_after": clocks(), "summary": report.summary(results)}
        save(out, results)
        progress(f"{stage.name}: {found['line']}")
    report.print_table(results)
    print(f"wrote {save(out, results)}" + (": a dry run, its times mean nothing" if args.dry_run else ""))
    return int(any(found["status"] != "ok" for found in results["stages"].values()))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in PLAN]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure", description="Measure kernels and model on this machine's GPU."
    )
    out = "directory of the JSON file (default: benchmarks/results; for a dry run a temporary one)"
    minutes = "for all stages together (default: 9, for a dry run 30)"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--minutes", type=float, help=minutes)
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU, in Triton's interpreter, tiny shapes"
    )
    parser.add_argument("--commit", help="the commit to record if the checkout has no .git")
    return parser.parse_args(argv)


# One stage, in the process of the command


def run_stage(stage: Stage, dry: bool, end: float) -> dict[str, Any]:
    """The status of a stage and the findings of its tasks. The status is ok, failed, or short: the time was
    over before every task had run."""
    start, parts = time.monotonic(), min(stage.parts, 2) if dry else stage.parts
    with tempfile.TemporaryDirectory(prefix="measure-") as scratch, ThreadPoolExecutor(parts) as pool:
        files = [Path(scratch) / f"{part}.jsonl" for part in range(parts)]
        supervisors = [Supervisor(stage, dry, end, part, parts, file) for part, file in enumerate(files)]
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
    short = (missing and not stage.open_ended) or not planned
    status = "failed" if failed or notes else "short" if short else "ok"
    line = f"{status}, {len(tasks)} of {len(planned)} tasks in {time.monotonic() - start:.0f} s"
    line += f"; out of time for {missing}" * bool(missing) + f"; {len(failed)} failed" * bool(failed)
    line += "".join(f"; {note}" for note in dict.fromkeys(notes))
    return {"status": status, "line": line, "tasks": tasks}


class Supervisor:
    """Runs one part of a stage's tasks in child processes, one after another, until all have run or the time
    is over."""

    def __init__(self, stage: Stage, dry: bool, end: float, part: int, parts: int, file: Path):
        self.stage, self.dry, self.end, self.part, self.parts, self.file = stage, dry, end, part, parts, file
        file.touch()

    def run(self) -> str | None:
        """None, or the reason why the stage itself failed."""
        while True:
            before = len(read_records(self.file))
            why = self.run_child()
            records = read_records(self.file)
            if why is None:  # every task has run, or there was no time for the next one
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
        """Run the remaining tasks in a child process. Returns None, or the reason why it did not end well."""
        done = {record["task"] for record in read_records(self.file) if "seconds_taken" in record}
        args = (self.stage, self.dry, done, self.part, self.parts, self.end, str(self.file))
        context: Any = multiprocessing.get_context("forkserver" if self.dry else "spawn")
        process = context.Process(target=run_tasks, args=args)
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
            f"exit code {process.exitcode}" if process.exitcode > 0 else f"died of signal {-process.exitcode}"
        )

    def kill(self, process: Any, why: str) -> str:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # together with the compilers that it started
        except ProcessLookupError:
            process.kill()  # it has not yet made itself the leader of a group
        process.join(5)
        return why

    def running(self, records: list[dict]) -> str | None:
        started = next((record["started"] for record in reversed(records) if "started" in record), None)
        return started if started not in {record.get("task") for record in records} else None

    def note(self, record: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_records(file: Path) -> list[dict]:
    """The records of the complete lines; a killed process may leave an incomplete one. NaN is not JSON: it
    becomes "NaN"."""
    lines = file.read_text().split("\n")[:-1]
    return [json.loads(line, parse_constant=str) for line in lines if line.endswith("}")]


# One stage, in its child processes


def run_tasks(stage: Stage, dry: bool, done: set[str], part: int, parts: int, end: float, file: str) -> None:
    """Run this part's tasks except those that are done, and write a line before and after each. This function
    has a process to itself, and ends it."""
    os.setpgrp()  # a kill of the group also ends the processes that this one starts
    os.dup2(2, 1)  # stdout is for the table
    os.environ.update(stage.variables)  # before the import of modules that read them
    if parts > 1:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # these processes already run in parallel
    import torch

    from benchmarks import stages, timing

    if dry:
        sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
        importlib.import_module("interpreter").install()  # makes the interpreter correct in bfloat16
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
            gc.collect()  # frees models that are no longer needed
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    os._exit(0)  # a regular exit could hang in the driver, and every line has been written


# The machine and the file


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def save(out: Path, results: dict[str, Any]) -> Path:
    """Replace the file in one step, so that it is complete whenever this command is stopped."""
    device = re.sub(r"[^a-z0-9]+", "-", str(results["device"]).lower()).strip("-")
    path = out / f"measure-{device}-{results['date'][:10]}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
    return path


def clocks() -> str:
    """The driver, the clocks (MHz), the power (W) and the temperature (C) from nvidia-smi, or why it cannot
    tell."""
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout or done.stderr).strip()


def commit() -> str:
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
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
