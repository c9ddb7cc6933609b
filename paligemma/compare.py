"""Finds where an implementation starts to differ: compares every intermediate result with the reference's, in
the order of the data flow. The results come from a model, or from a file of arrays.

    python -m paligemma.compare --model DIR --image cat.jpg --prompt "detect cat" --dtype bfloat16

The rule: the float64 reference is the truth. A result's RMS error may be twice, and its largest error four
times, that of the reference's own formulas computed in the dtype in question (float32 arithmetic, every
result rounded to that dtype). The exit code is 0 if all results keep the rule, 1 if one exceeds it."""

import argparse
import zipfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import command, pictures
from .errors import PaliGemmaError

if TYPE_CHECKING:
    from .model import PaliGemma

# Modules whose input is recorded too, under NAME.input: the results of attention, GeGLU and residual sums,
# which no module of their own returns.
WITH_INPUT = (
    "out_proj", "fc2", "layer_norm2", "o_proj", "down_proj",
    "post_attention_layernorm", "pre_feedforward_layernorm", "language_model.model",
)  # fmt: skip
DTYPE = "bfloat16"  # without --dtype, unless the checkpoint is of quantised weights for another
RMS_FACTOR = 2
MAX_FACTOR = 4  # the largest of some thousand errors differs by up to 2x between equally accurate runs


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    from . import reference
    from .checkpoint import folders, hub
    from .processor import Processor

    images = pictures.read_images(args.image)
    if args.dump:
        command.check_replaceable(args.dump)
    directory = hub.resolve(args.model, dtype=args.dtype or DTYPE, revision=args.revision)
    folders.check_model(directory)
    if args.dtype is None:
        saved = folders.saved(directory)
        args.dtype = saved.dtype if saved else DTYPE
    inputs = Processor.load(directory).arrays(args.prompt, [images])
    if args.against:
        candidate = read_dump(args.against)
    else:
        progress(f"computing with {args.backend} in {args.dtype}")
        candidate = run_model(directory, args, inputs)
    if args.dump:
        with command.replacing(args.dump) as file:
            np.savez(file, **candidate)  # pyright: ignore[reportArgumentType]  (a name may be any string)
        progress(f"wrote {len(candidate)} arrays to {args.dump}")
    progress(f"computing the reference's formulas in {args.dtype}")
    yardstick: dict[str, np.ndarray] = {}
    reference.load(directory, dtype=args.dtype).forward(**inputs, record=yardstick)
    progress("computing the reference in float64")
    judge = Judge(candidate, yardstick, args.dtype)
    reference.load(directory).forward(**inputs, record=judge)
    return judge.report()


def run_model(directory, args: argparse.Namespace, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    from .loading import load_hf_model

    model, _ = load_hf_model(directory, device=args.device, dtype=args.dtype, backend=args.backend)
    record: dict[str, np.ndarray] = {}
    with torch.no_grad(), recording(model, record):
        model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return record


@contextmanager
def recording(model: "PaliGemma", record: MutableMapping[str, np.ndarray]) -> Iterator[None]:
    """Inside this block, each forward pass stores every module's output in `record` under the module's name
    (the whole model's as "logits"), and the input of the modules WITH_INPUT as NAME.input. The reference
    records under the same names."""
    import torch

    from . import ops

    def keep(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            record[name] = value.detach().float().cpu().numpy().copy()

    def hook(name: str):
        def after(module, args, output) -> None:
            keep(name or "logits", output)
            if name.endswith(WITH_INPUT) and args:
                keep(f"{name}.input", args[0])

        return after

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with ops.without_fusion():
            yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Line:
    name: str
    shape: tuple[int, ...]
    rms: float  # error relative to the truth's RMS
    rms_allowed: float
    max: float
    max_allowed: float

    @property
    def exceeds(self) -> bool:
        return not (self.rms <= self.rms_allowed and self.max <= self.max_allowed)  # NaN exceeds


def compare(name: str, value: np.ndarray, truth: np.ndarray, yardstick: np.ndarray, dtype: str) -> Line:
    """The errors of one result, and what the rule allows. The yardstick is the same result of the reference's
    formulas in `dtype`; if it happens to be more exact than the truth rounded to `dtype`, the rounded truth
    replaces it."""
    from .reference.params import to_dtype

    nearest = to_dtype(truth, dtype)
    scale = float(np.sqrt(np.mean(truth**2))) or 1.0

    def errors(x: np.ndarray) -> tuple[float, float]:
        difference = x.astype(np.float64) - truth
        return float(np.sqrt(np.mean(difference**2))) / scale, float(np.abs(difference).max())

    (rms, most), (y_rms, y_most), (n_rms, n_most) = errors(value), errors(yardstick), errors(nearest)
    rms_allowed, max_allowed = RMS_FACTOR * max(y_rms, n_rms), MAX_FACTOR * max(y_most, n_most)
    return Line(name, truth.shape, rms, rms_allowed, most, max_allowed)


class Judge(dict[str, np.ndarray]):
    """Receives the truth as the reference's `record`, one result at a time, and keeps only the comparison."""

    def __init__(self, candidate: dict[str, np.ndarray], yardstick: dict[str, np.ndarray], dtype: str):
        super().__init__()
        self.candidate, self.yardstick, self.dtype = candidate, yardstick, dtype
        self.lines: list[Line] = []

    def __setitem__(self, name: str, truth: np.ndarray) -> None:
        if name in self.candidate:
            value = self.candidate[name]
            if value.shape != truth.shape:
                shapes = f"{name} has shape {value.shape}; the reference's is {truth.shape}"
                raise PaliGemmaError(f"{shapes}: compare results for the same image and prompt")
            self.lines.append(compare(name, value, truth, self.yardstick[name], self.dtype))

    def report(self) -> int:
        """Print the table; return 1 if a line exceeds the rule, else 0."""
        if not self.lines:
            names = ", ".join(list(self.yardstick)[:3])
            raise PaliGemmaError(f"no name in common with the reference: use its names, such as {names}")
        width = max(len(line.name) for line in self.lines)
        print(f"{'name':{width}}  {'rel. RMS':>9} {'allowed':>9}  {'maximum':>9} {'allowed':>9}  shape")
        first = next((line for line in self.lines if line.exceeds), None)
        for line in self.lines:
            mark = "  <-- the first that exceeds" if line is first else "  exceeds" if line.exceeds else ""
            errors = f"{line.rms:9.2e} {line.rms_allowed:9.2e}  {line.max:9.2e} {line.max_allowed:9.2e}"
            print(f"{line.name:{width}}  {errors}  {line.shape}{mark}")
        bad = sum(line.exceeds for line in self.lines)
        which = f", the first is {first.name}" if first else ""
        print(f"{len(self.lines)} results compared, {bad} exceed the rule{which}")
        return 1 if bad else 0


def read_dump(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name. bfloat16 as JAX saves it (2-byte void) is widened to float32. Never
    unpickles. Raises PaliGemmaError for a file that cannot be read."""
    unreadable = (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile)  # TypeError: one .npy array
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: widened(archive[name]) for name in archive.files}
    except unreadable as error:
        raise PaliGemmaError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from None


def widened(array: np.ndarray) -> np.ndarray:
    if not array.dtype.str.endswith("V2"):
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def progress(message: str) -> None:
    command.tell(f"{message} ...")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Compare a model's results with the reference's, name by name."
    parser = command.Parser(prog="python -m paligemma.compare", description=about)
    add = parser.add_argument
    backends, dtypes = ("auto", "torch", "numba", "triton"), ("float32", "float16", "bfloat16")
    # fmt: off
    add("--model", required=True, help="hub id or local directory")
    add("--image", required=True, nargs="+", action="extend", metavar="PATH",
        help="path of the image, or - to read it from stdin; several for a prompt about all of them")
    add("--prompt", required=True, type=command.utf8, help="text prompt")
    add("--backend", default="auto", choices=backends, help="backend of the model that is judged (default: "
        "triton on a GPU; numba on a CPU where it is installed, else torch)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="where that model computes (default: cuda if there is a GPU, else cpu)")
    add("--dtype", choices=dtypes, help="dtype of that model, or of --against (default: that of the model if "
        f"its weights are saved in a quantised format, else {DTYPE})")
    add("--against", metavar="FILE.npz",
        help="judge the arrays in this file, from any implementation, instead of a model")
    add("--dump", metavar="FILE.npz", help="write the judged arrays to this file")
    add("--revision", help="branch, tag or commit on the hub")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.process(main)
