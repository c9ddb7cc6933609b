"""Answers questions on a Ray cluster, for `paligemma.batch --ray`. The workers read the pictures and answer;
this process sends them the questions and receives the records."""

import argparse
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from .command import STDERR, tell
from .errors import PaliGemmaError
from .fields import shown

if TYPE_CHECKING:
    from .pipeline import Question

CALL = 8  # rows that a worker receives at a time, for each row that it decodes together
SLOTS = 16  # rows that are assumed to be decoded together, if the worker chooses
NOBODY = "\0"  # the id in the record of a worker that could not load its model
PATHS = ("tokenizer", "adapter", "masks", "mask_decoder")  # options that can be paths
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}  # unless the user sets them


def check_installed() -> None:
    """Raise PaliGemmaError if Ray Data is not installed."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        problem = f"--ray needs Ray Data, which cannot be imported ({error})"
        raise PaliGemmaError(f"{problem}: pip install 'paligemma[ray]'") from None


def answers(
    args: argparse.Namespace, options: dict[str, Any], questions: "list[Question]"
) -> Iterator[dict[str, Any]]:
    """The records of all questions, in the order in which they arrive. options: those of `load_pipeline`."""
    with connected(args.ray), redirect_stdout(STDERR):  # pyright: ignore[reportArgumentType]
        yield from _answers(args, options, questions)


def _answers(
    args: argparse.Namespace, options: dict[str, Any], questions: "list[Question]"
) -> Iterator[dict[str, Any]]:
    import ray
    from ray.exceptions import RayError

    from .ray import Generate, to_record, to_table

    class Worker(Generate):
        """If its constructor failed, Ray would print tracebacks. It tells what is wrong as a record."""

        def __init__(self, **options: Any):
            self.fault, self.log_probs = "", options["log_probs"]
            try:
                super().__init__(**options)
            except PaliGemmaError as error:
                self.fault = str(error)

        def __call__(self, batch: Any) -> Any:
            if self.fault:
                return to_table([{"id": NOBODY, "error": self.fault}], self.log_probs)
            return super().__call__(batch)

    if not questions:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = sum(int(node.get("GPU", 0)) for node in nodes), [int(node.get("CPU", 0)) for node in nodes]
    on_gpu = gpus > 0 and args.device != "cpu"
    machines = len([count for count in cpus if count])
    workers = min(args.ray_workers or (gpus if on_gpu else machines), len(questions))
    if not workers:
        raise PaliGemmaError("the cluster has neither a GPU nor a CPU for workers: start a node that has one")
    if workers > (gpus if on_gpu else sum(cpus)):  # Ray would wait for more machines
        have = f"{gpus} GPUs" if on_gpu else f"{sum(cpus)} CPUs"
        raise PaliGemmaError(
            f"--ray-workers {workers}: the cluster has {have}, and a worker takes one at least"
        )
    each = share(cpus, workers)  # Ray gives so many threads to a worker on a CPU
    resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": each}
    size = CALL * (args.batch_size or SLOTS)
    blocks = max(-(-len(questions) // size), workers)
    tell(f"{workers} workers on {len(nodes)} machines, {f'{gpus} GPUs' if on_gpu else f'{each} CPUs each'}")
    given = {name: _absolute(value) if name in PATHS else value for name, value in options.items()}
    given |= {"slots": args.batch_size, "top_p": args.top_p, "seed": args.seed}
    ray.data.DataContext.get_current().enable_progress_bars = False  # this command has its own
    answered = ray.data.from_items([_row(q) for q in questions], override_num_blocks=blocks).map_batches(
        Worker, fn_constructor_kwargs={"model": _absolute(args.model), **given}, batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers), **resources,
    )  # fmt: skip
    ids = {str(q.id): q.id for q in questions}
    try:
        for row in answered.iter_rows():
            told = to_record(row)
            if told["id"] not in ids:  # NOBODY
                raise PaliGemmaError(told["error"])
            yield told | {"id": ids[told["id"]]}
    except RayError as error:
        raise PaliGemmaError(f"Ray: {reason(error)}") from None


def share(cpus: list[int], workers: int) -> int:
    """The most CPUs that each of so many workers can have on machines with these."""
    most = range(max(cpus, default=1), 1, -1)
    return next((n for n in most if sum(count // n for count in cpus) >= workers), 1)


def _row(question: "Question") -> dict[str, Any]:
    """A question as a row of a table. The ids of a column have one type; here it is text."""
    from .processor import as_list

    id = str(question.id)
    paths = [os.path.abspath(os.fsdecode(image)) for image in as_list(question.image)]
    for name, text in (("id", id), *(("image", path) for path in paths)):
        try:
            text.encode()
        except UnicodeEncodeError:
            problem = f"the {name} {shown(text)} is not UTF-8 text, and Ray's tables take no other"
            raise PaliGemmaError(f"{problem}: rename it, or leave out --ray") from None
    return {"id": id, "image": paths, "prompt": question.prompt, "temperature": question.sampling.temperature}


def _absolute(name: str | None) -> str | None:
    """The absolute path of a file or directory, because workers run elsewhere; other names as they are."""
    return os.path.abspath(name) if name and os.path.exists(name) else name


def reason(error: BaseException) -> str:
    """What an error of Ray says: the last line of a traceback, or the first line of a message."""
    lines = str(error).strip().splitlines()
    for line in reversed(lines):
        if found := re.match(r"\s*(?:[\w.]*\.)?\w*(?:Error|Exception|Interrupt): (.*)", line):
            return found[1]
    return lines[0] if lines else type(error).__name__


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster at this address, or to one that is started here if it is "local"."""
    import ray
    from ray.exceptions import RayError

    check_reachable(address)
    for name in ("ray", "ray.data"):  # what fails is an error of this command
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        try:
            quiet = logging.CRITICAL
            if address == "local":
                ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=quiet)
            else:
                ray.init(address, log_to_driver=False, logging_level=quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, RayError) as error:
            raise PaliGemmaError(f"--ray {address}: {reason(error)}") from None
        finally:
            for number, handler in handlers.items():  # Ray has its own handler of SIGTERM
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise PaliGemmaError if nothing listens at host:port. Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isascii() and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        problem = f"--ray {address}: no Ray cluster answers there ({error})"
        raise PaliGemmaError(
            f"{problem}: give the address that `ray start --head` prints, or local"
        ) from None
