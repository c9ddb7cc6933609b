"""Trains the demo model from scratch, in three stages: python -m paligemma.demo.train DIRECTORY

In stage 1 the vision tower alone learns what each patch shows, through linear heads that are discarded
afterwards. In stage 2 the whole model learns to answer. In stage 3 it learns the cases that it most often
gets wrong. The model's code is that of inference, on its torch path. The same seed, steps and machine give
the same file. An interrupted run resumes from its last snapshot."""

import argparse
import json
import math
import pickle
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import command
from ..command import at_least
from ..errors import PaliGemmaError
from ..machine import cpu_name
from ..model import PaliGemma
from ..processor import Processor
from ..tokenizer import Tokenizer
from . import architecture
from .architecture import LOCS
from .evaluate import evaluate
from .lessons import Lessons, Step
from .losses import Heads, answer_loss, trainable_attention
from .muon import Muon

BATCH = {1: 64, 2: 32, 3: 32}  # scenes in a step, by stage
RATE = {1: 1.5e-3, 2: 1.5e-3, 3: 1e-3}  # peak learning rate of Muon, by stage; AdamW's is two thirds of it
WARM_UP = 50  # steps
DECAY = 0.05  # weight decay
PATCH_WEIGHT = {2: (0.5, 0.0), 3: (0.2, 0.0)}  # weight of stage 1's loss, from start to end of later stages
BLUR = (16.0, 6.0)  # bins: standard deviation of a coordinate's target, from start to middle of stage 2
HARDER = 0.76  # share of stage 2 after which its lessons are as hard as those of stage 3
SNAPSHOT = 200  # steps from one snapshot to the next


class Run:
    """The whole state of a training run, which can be saved and resumed."""

    def __init__(self, seed: int, steps: dict[int, int]):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.seed, self.steps, self.stage, self.step, self.seconds = seed, steps, 1, 0, 0.0
        self.tokenizer, config = architecture.tokenizer_model(), architecture.config()
        self.processor = Processor(Tokenizer(self.tokenizer, config), config, architecture.PREPROCESSOR)
        self.first_loc = self.processor.tokenizer.pieces.piece_to_id("<loc0000>")
        self.model = PaliGemma(config)
        locs = range(self.first_loc, self.first_loc + LOCS)
        self.model.load_state_dict(architecture.initial_weights(generator, locs), strict=True)
        self.model.requires_grad_(True)
        self.heads = Heads()
        self.optimisers = self._optimisers()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for everything else."""
        named = {**dict(self.model.named_parameters()), **dict(self.heads.named_parameters())}
        if self.stage == 1:
            later = ("language_model", "multi_modal")
            named = {name: value for name, value in named.items() if not name.startswith(later)}
        matrices = [value for name, value in named.items() if ".layers." in name and value.ndim == 2]
        chosen = set(map(id, matrices))
        rest = [value for value in named.values() if id(value) not in chosen]
        adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=DECAY)
        return [Muon(matrices, weight_decay=DECAY), adam]

    def go(self, snapshot: Path | None) -> None:
        """Train to the end, with the means of the measured values on stderr every 50 steps."""
        started = time.perf_counter() - self.seconds
        done = self.step + sum(self.steps[i] for i in range(1, self.stage))
        with tqdm(total=sum(self.steps.values()), initial=done, unit="step", smoothing=0.05) as bar:
            while True:
                measured: dict[str, list[float]] = {}
                for batch in self._batches():
                    for name, value in self.learn(batch).items():
                        measured.setdefault(name, []).append(value)
                    self.step, self.seconds = self.step + 1, time.perf_counter() - started
                    bar.update()
                    if self.step % 50 == 0:
                        means = [f"{name} {sum(v) / len(v):.4g}" for name, v in measured.items()]
                        line = [f"stage {self.stage}", f"step {self.step}", f"{self.seconds:.0f} s", *means]
                        bar.write("  ".join(line), file=sys.stderr)
                        measured = {}
                    if snapshot and (self.step % SNAPSHOT == 0 or self.step == self.steps[self.stage]):
                        self.save(snapshot)
                if self.stage == max(self.steps):
                    return
                self.stage, self.step = self.stage + 1, 0
                self.optimisers = self._optimisers()

    def _batches(self) -> DataLoader:
        """The remaining steps of the stage, drawn by another process."""
        harder, left = round(HARDER * self.steps[2]), range(self.step, self.steps[self.stage])
        lessons = Lessons(self.processor, self.seed, self.stage, BATCH[self.stage], harder=harder)
        return DataLoader(lessons, sampler=left, batch_size=None, num_workers=1, prefetch_factor=6)

    def learn(self, batch: Step) -> dict[str, float]:
        """Train one step, and return the values measured in it."""
        done = self.step / self.steps[self.stage]
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        rate = RATE[self.stage] * min(1.0, (self.step + 1) / WARM_UP) * cosine
        for optimiser, part in zip(self.optimisers, (1.0, 2 / 3), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * part
        with trainable_attention():
            seen = self.model.vision_tower.vision_model(batch.pixel_values)
            loss, measured = self.heads(seen, batch.patches)
            if self.stage > 1:
                blur = BLUR[0] + (BLUR[1] - BLUR[0]) * (min(1.0, 2 * done) if self.stage == 2 else 1.0)
                start, end = PATCH_WEIGHT[self.stage]
                pictures = self.model.multi_modal_projector.linear(seen)
                answer, more = answer_loss(self.model, pictures, batch.rows, self.first_loc, blur)
                loss, measured = answer + (start + (end - start) * done) * loss, {**measured, **more}
            loss.backward()
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        parameters = [value for group in groups for value in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return {**measured, "norm": float(norm)}

    def save(self, path: Path) -> None:
        state = {
            "settings": [self.seed, self.steps], "stage": self.stage, "step": self.step,
            "seconds": self.seconds, "model": self.model.state_dict(), "heads": self.heads.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise PaliGemmaError(f"{path} is not a snapshot of a training run: {reason}") from None
        own, other = [self.seed, self.steps], state["settings"]
        if other != own:
            problem = f"is of a run with seed and steps {other}, not {own}"
            raise PaliGemmaError(f"{path} {problem}: give another --snapshot")
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimisers = self._optimisers()
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def record(run: Run, scores: dict) -> dict:
    """The settings and the results of the run, for training.json."""
    vision, everything, hardest = run.steps.values()
    steps = f"--vision-steps {vision} --steps {everything} --last-steps {hardest}"
    versions = {name: version(name) for name in ("torch", "numpy", "pillow", "sentencepiece")}
    return {
        "command": f"python -m paligemma.demo.train DIRECTORY {steps} --seed {run.seed}",
        "seed": run.seed,
        "steps": {"vision": vision, "everything": everything, "hardest": hardest},
        "seconds": round(run.seconds),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
        "parameters": sum(value.numel() for value in run.model.parameters()),
        "held_out": scores,
    }


def machine() -> str:
    """The threads, the CPU and its instruction set, such as "1 core of AMD EPYC (AVX2)"."""
    return f"{torch.get_num_threads()} core of {cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)  # another number would change the order of sums, and so the result
    torch.set_flush_denormal(True)
    try:
        train(args)
    except KeyboardInterrupt:
        saved = args.snapshot and args.snapshot.exists()
        resume = f": the same command resumes from {args.snapshot}" if saved else ""
        print(f"\ninterrupted{resume}", file=sys.stderr)
        return 130
    except (PaliGemmaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_flush_denormal(False)
    return 0


def train(args: argparse.Namespace) -> None:
    if (args.directory / "config.json").exists() and not args.overwrite:
        remedy = "give another directory, or --overwrite"
        raise PaliGemmaError(f"{args.directory} holds a checkpoint already: {remedy}")
    for directory in (args.directory, args.snapshot.parent if args.snapshot else args.directory):
        directory.mkdir(parents=True, exist_ok=True)
    run = Run(args.seed, {1: args.vision_steps, 2: args.steps, 3: args.last_steps})
    if args.snapshot and args.snapshot.exists():
        run.resume(args.snapshot)
    run.go(args.snapshot)
    architecture.write(args.directory, run.tokenizer, run.model.state_dict())
    scores = evaluate(args.directory, args.scenes, seed=run.seed + 1)
    history = record(run, {"scenes": args.scenes, "seed": run.seed + 1, **scores})
    (args.directory / "training.json").write_text(json.dumps(history, indent=2) + "\n")
    print(json.dumps(scores))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Train the demo model from scratch, and write and score its checkpoint."
    parser = command.Parser(prog="python -m paligemma.demo.train", description=about)
    add, default = parser.add_argument, "(default: %(default)s)"
    # fmt: off
    add("directory", type=Path, help="directory for the checkpoint")
    add("--vision-steps", type=at_least(1), default=2000, metavar="N", help=f"steps of stage 1 {default}")
    add("--steps", type=at_least(1), default=5000, metavar="N", help=f"steps of stage 2 {default}")
    add("--last-steps", type=at_least(1), default=3000, metavar="N", help=f"steps of stage 3 {default}")
    add("--seed", type=at_least(0), default=0, metavar="N", help=f"seed of weights and scenes {default}")
    add("--scenes", type=at_least(1), default=1500, metavar="N", help=f"scenes for the final score {default}")
    add("--snapshot", type=Path, metavar="FILE",
        help=f"save the run to this file every {SNAPSHOT} steps; if the file exists, resume from it")
    add("--overwrite", action="store_true", help="replace a checkpoint that is in the directory")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.process(main)
