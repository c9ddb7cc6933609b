"""The turns of the contenders: what is asked of each, and what they answered."""

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.whole_model import open_or_make
from paligemma import checkpoint
from paligemma.command import tell
from paligemma.processor import Processor

from .contenders import ENGINE, ROWS, Contender, Installed, installed
from .limits import machine_now, work_of
from .processes import Failed, Worker, Workers
from .worker import Job, Request


class Race:
    """All contenders and their turns. `turns` has the measurements, and `said` what the table says of a
    contender besides."""

    def __init__(self, args, contenders: list[Contender], python: dict[str, str], scratch: Path):
        config, stored = checkpoint.load(args.model)
        self.model, self.size = args.model.resolve(), sum(tensor.nbytes for tensor in stored.values())
        self.args, self.contenders, self.python, self.scratch = args, contenders, python, scratch
        weights = {tensor.file for tensor in stored.values()}
        told = sorted((str(x.resolve()), x.stat().st_size, x.stat().st_mtime_ns) for x in weights)
        self.stamp = f"{zlib.crc32(repr(told).encode()):08x}"  # other weights have other files
        self.weights = sorted(weights)
        self.inputs = scratch / "inputs.npz"
        self.positions = write_inputs(self.inputs, args, config.image_token_index)
        self.work = work_of(config, self.positions)
        self.workers = Workers()
        self.turns: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
        self.said: dict[str, dict[str, str]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.found: dict[str, Installed] = {}

    def run(self, after_turn: Callable[[], object]) -> None:
        for contender in self.contenders:
            self.find(contender)
        for file in self.weights:  # into the page cache, so that loading does not measure the disk
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
        for number in range(self.args.rounds):
            for contender in self.contenders:
                if not {"missing", "error"} & set(self.said.get(contender.name, {})):
                    tell(f"round {number + 1} of {self.args.rounds}: {contender.name}")
                    self.attempt(contender)
                    after_turn()

    def find(self, contender: Contender) -> None:
        engine, python = ENGINE[contender.engine], self.python[contender.engine]
        if contender.engine not in self.found:
            self.found[contender.engine] = found = installed(engine, python)
            self.versions[contender.engine] = found.versions
        if not self.found[contender.engine].complete:
            where = "" if python == sys.executable else f" in {python}"
            self.said[contender.name] = {"missing": f"not installed{where}: {engine.install}"}
        elif not engine.whole:
            self.said[contender.name] = {"note": "decoder only"}

    def attempt(self, contender: Contender) -> None:
        try:
            self.turns[contender.name].append(self.turn(contender))
        except Failed as error:
            tell(f"{contender.name}: {error}")
            self.said[contender.name] = {"error": str(error)}
            if worker := self.workers.loaded.pop(contender.name, None):
                worker.end()

    def turn(self, contender: Contender) -> dict[str, Any]:
        """One turn: short generations to warm up, then the measured ones. The median of the steps of several
        rows leaves out the first steps, in which an engine may compile."""
        engine, new = ENGINE[contender.engine], self.args.tokens
        text = self.positions
        image = None if engine.whole else text
        machine = machine_now()
        found: dict[str, Any] = {"machine": machine._asdict()}
        worker = self.workers.take(contender.name)
        if worker is None:
            worker = self.start(contender)
            found |= worker.loaded
            found["cold_first_s"] = worker.ask(Request(1, 2, image))["first_s"]
        worker.ask(Request(1, 2, text))
        one = worker.ask(Request(1, new, image))
        prefill = one if not engine.whole else worker.ask(Request(1, 1, text))
        several = worker.ask(Request(ROWS, new, max(1, text // ROWS)))
        worker.stop()
        read = self.work.weights * contender.bits / 8
        return found | {
            "decode_ms": one["step_ms"], "first_token_s": one["first_s"] if engine.whole else None,
            "prefill_s": prefill["first_s"], "rows_ms": several["step_ms"],
            "peak_gb": worker.peak / 1e9, "tokens": one["tokens"],
            "of_reading": machine.read_gb_s and read / one["step_ms"] / 1e6 / machine.read_gb_s,
        }  # fmt: skip

    def start(self, contender: Contender) -> Worker:
        engine = ENGINE[contender.engine]
        files = (self.args.files or self.scratch).resolve() / f"{contender.name} {self.stamp}".replace(
            " ", "-"
        )
        job = Job(
            engine.module, contender.engine, contender.weights, str(self.model), str(files), str(self.inputs),
            ROWS, self.args.tokens,
        )  # fmt: skip
        peaks = [turn["peak_gb"] * 1e9 for turn in self.turns[contender.name]]
        self.workers.make_room(max(peaks, default=engine.memory * self.size))
        found, python = self.found[contender.engine], self.python[contender.engine]
        assert found.prefix
        log, deadline = self.scratch / f"{contender.name}.log", self.args.deadline
        if engine.prepares and not files.exists():
            files.parent.mkdir(parents=True, exist_ok=True)
            tell(f"{contender.name}: making its files")
            worker = Worker(python, found.prefix, job, log, 10 * deadline, prepare=True)
            self.said[contender.name] |= worker.loaded
            worker.end()
        worker = Worker(python, found.prefix, job, log, deadline)
        self.workers.loaded[contender.name] = worker
        return worker


def write_inputs(path: Path, args, image_token: int) -> int:
    """The inputs of all contenders; returns the number of positions of image and prompt."""
    processor = Processor.load(args.model)
    arrays = processor.arrays(args.prompt, open_or_make(args.image))
    ids, pixels = arrays["input_ids"], arrays["pixel_values"]
    picture = np.clip((pixels[0].transpose(1, 2, 0) + 1) * 127.5, 0, 255).round().astype(np.uint8)
    text = np.random.default_rng(0).integers(image_token // 2, image_token, ids.shape)
    text[:, 0] = 2  # <bos>
    np.savez(path, input_ids=ids, pixel_values=pixels, picture=picture, text_ids=text)
    return ids.shape[1]
