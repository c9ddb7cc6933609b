"""Train the demo model from nothing, in three stages: python -m paligemma.demo.train DIRECTORY

First the vision tower alone learns what each patch shows, by linear heads that are thrown away; then all of
it learns to answer; then what is most often got wrong. The model is the one that answers in production, on
its torch path. The same seed, steps and machine give the same file; a run that broke off goes on from its
last snapshot."""

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

BATCH = {1: 64, 2: 32, 3: 32}  # scenes a step, by stage
RATE = {1: 1.5e-3, 2: 1.5e-3, 3: 1e-3}  # learning rate of Muon, by stage; AdamW has two thirds of it
WARM_UP = 50  # steps
DECAY = 0.05  # of weights
PATCH_WEIGHT = {
    2: (0.5, 0.0),
    3: (0.2, 0.0),
}  # of the first stage's loss in the later ones, from their start to their end
BLUR = (
    16.0,
    6.0,
)  # bins: standard deviation of a coordinate's target over the first half of stage 2; constant then
HARDER = 0.76  # of stage 2, from where lessons are already about what is most often got wrong
SNAPSHOT = 200  # steps


class Run:
    """A training in progress: all of its state, so that it can be saved and go on."""

    def __init__(self, seed: int, steps: dict[int, int]):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.seed, self.steps, self.stage, self.step, self.seconds = seed, steps, 1, 0, 0.0
        self.tokenizer = architecture.tokenizer_model()
        self.processor = Processor(
            Tokenizer(self.tokenizer, architecture.config()), architecture.config(), architecture.PREPROCESSOR
        )
        self.first_loc = self.processor.tokenizer.pieces.piece_to_id("<loc0000>")
        self.model = PaliGemma(architecture.config())
        self.model.load_state_dict(
            architecture.initial_weights(generator, range(self.first_loc, self.first_loc + LOCS)), strict=True
        )
        self.model.requires_grad_(True)
        self.heads = Heads()
        self.optimisers = self._optimisers()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for everything else."""
        named = {**dict(self.model.named_parameters()), **dict(self.heads.named_parameters())}
        if self.stage == 1:
            named = {
                name: value
                for name, value in named.items()
                if not name.startswith(("language_model", "multi_modal"))
            }
        matrices = [value for name, value in named.items() if ".layers." in name and value.ndim == 2]
        chosen = set(map(id, matrices))
        rest = [value for value in named.values() if id(value) not in chosen]
        return [
            Muon(matrices, weight_decay=DECAY),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=DECAY),
        ]

    def go(self, snapshot: Path | None) -> None:
        """To the end, with a line about every 50 steps on stderr."""
        started = time.perf_counter() - self.seconds
        with tqdm(
            total=sum(self.steps.values()),
            initial=self.step + sum(self.steps[i] for i in range(1, self.stage)),
            unit="step",
            smoothing=0.05,
        ) as bar:
            while True:
                lessons = Lessons(
                    self.processor,
                    self.seed,
                    self.stage,
                    BATCH[self.stage],
                    harder=round(HARDER * self.steps[2]),
                )
                loader = DataLoader(
                    lessons,
                    sampler=range(self.step, self.steps[self.stage]),
                    batch_size=None,
                    num_workers=1,
                    prefetch_factor=6,
                )
                measured: dict[str, list[float]] = {}
                for batch in loader:
                    for name, value in self.learn(batch).items():
                        measured.setdefault(name, []).append(value)
                    self.step, self.seconds = self.step + 1, time.perf_counter() - started
                    bar.update()
                    if self.step % 50 == 0:
                        means = "  ".join(
                            f"{name} {sum(values) / len(values):.4g}" for name, values in measured.items()
                        )
                        bar.write(
                            f"stage {self.stage}  step {self.step}  {self.seconds:.0f} s  {means}",
                            file=sys.stderr,
                        )
                        measured = {}
                    if snapshot and (self.step % SNAPSHOT == 0 or self.step == self.steps[self.stage]):
                        self.save(snapshot)
                if self.stage == max(self.steps):
                    return
                self.stage, self.step = self.stage + 1, 0
                self.optimisers = self._optimisers()

    def learn(self, batch: Step) -> dict[str, float]:
        """One step; what it measured."""
        done = self.step / self.steps[self.stage]
        rate = (
            RATE[self.stage]
            * min(1.0, (self.step + 1) / WARM_UP)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        )
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
        parameters = [
            value
            for optimiser in self.optimisers
            for group in optimiser.param_groups
            for value in group["params"]
        ]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return {**measured, "norm": float(norm)}

    def save(self, path: Path) -> None:
        state = {
            "settings": [self.seed, self.steps], "stage": self.stage, "step": self.step, "seconds": self.seconds, "model": self.model.state_dict(),
            "heads": self.heads.state_dict(), "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }  # fmt: skip
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise PaliGemmaError(
                f"{path} is not a snapshot of a training: {str(error).splitlines()[0]}"
            ) from None
        if state["settings"] != [self.seed, self.steps]:
            raise PaliGemmaError(
                f"{path} is of a run with seed and steps {state['settings']}, not {[self.seed, self.steps]}: give it another --snapshot"
            )
        self.stage, self.step, self.seconds = state["stage"], state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimisers = self._optimisers()
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def record(run: Run, scores: dict) -> dict:
    """What one wants to know of the run that made a checkpoint."""
    vision, everything, hardest = run.steps.values()
    return {
        "command": f"python -m paligemma.demo.train DIRECTORY --vision-steps {vision} --steps {everything} --last-steps {hardest} --seed {run.seed}",
        "seed": run.seed,
        "steps": {"vision": vision, "everything": everything, "hardest": hardest},
        "seconds": round(run.seconds),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "sentencepiece")},
        },
        "parameters": sum(value.numel() for value in run.model.parameters()),
        "held_out": scores,
    }


def machine() -> str:
    """Such as "1 core of AMD EPYC (AVX2)"."""
    return f"{torch.get_num_threads()} core of {cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(1)  # the order of sums is part of what makes a run reproducible
    torch.set_flush_denormal(True)
    try:
        train(args)
    except KeyboardInterrupt:
        print(
            "\ninterrupted"
            + (
                f": the same command goes on from {args.snapshot}"
                if args.snapshot and args.snapshot.exists()
                else ""
            ),
            file=sys.stderr,
        )
        return 130
    except (PaliGemmaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        torch.set_flush_denormal(False)
    return 0


def train(args: argparse.Namespace) -> None:
    if (args.directory / "config.json").exists() and not args.overwrite:
        raise PaliGemmaError(
            f"{args.directory} holds a checkpoint already: give another directory, or --overwrite"
        )
    for directory in (args.directory, args.snapshot.parent if args.snapshot else args.directory):
        directory.mkdir(parents=True, exist_ok=True)
    run = Run(args.seed, {1: args.vision_steps, 2: args.steps, 3: args.last_steps})
    if args.snapshot and args.snapshot.exists():
        run.resume(args.snapshot)
    run.go(args.snapshot)
    architecture.write(args.directory, run.tokenizer, run.model.state_dict())
    scores = evaluate(args.directory, args.scenes, seed=run.seed + 1)
    (args.directory / "training.json").write_text(
        json.dumps(record(run, {"scenes": args.scenes, "seed": run.seed + 1, **scores}), indent=2) + "\n"
    )
    print(json.dumps(scores))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m paligemma.demo.train",
        description="Train the demo model from nothing, and write and score its checkpoint.",
    )
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    parser.add_argument(
        "--vision-steps",
        type=at_least(1),
        default=2000,
        metavar="N",
        help="of the first stage (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        default=5000,
        metavar="N",
        help="of the second stage (default: %(default)s)",
    )
    parser.add_argument(
        "--last-steps",
        type=at_least(1),
        default=3000,
        metavar="N",
        help="of the third stage (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        metavar="N",
        help="of weights and scenes (default: %(default)s)",
    )
    parser.add_argument(
        "--scenes",
        type=at_least(1),
        default=1500,
        metavar="N",
        help="that the result is scored on (default: %(default)s)",
    )
    parser.add_argument(
        "--snapshot",
        type=Path,
        metavar="FILE",
        help=f"saved every {SNAPSHOT} steps; where it is there, the run goes on from it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is in the directory"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.process(main)
