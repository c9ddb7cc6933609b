"""Times the load, the first token and the decode of a whole checkpoint, compares them with transformers and
with the limit of the machine, in one run. On a CPU it measures this engine twice: with the best backend that
is installed, and with torch's operations alone.

    python -m benchmarks.random_checkpoint checkpoints/random-3b
    python -m benchmarks.whole_model --model checkpoints/random-3b

Contenders run in turn, each in a process of its own. So the load time and the peak memory are those of a
fresh start with the file in the page cache. The first token is timed cold and then warm. The command writes
benchmarks/results/whole_model-DEVICE-DTYPE-DATE.json and prints a table."""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from paligemma.machine import cpu_name, read_bandwidth

BACKENDS = {"paligemma": "auto", "paligemma torch": "torch"}  # auto: on a CPU Numba's kernel if installed
CONTENDERS = (*BACKENDS, "transformers sdpa", "transformers eager")
TIMES = ("load_s", "first_token_cold_s", "first_token_s", "decode_ms", "peak_gb")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model", description="Measure a checkpoint beside transformers."
    )
    parser.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    image = "an image file (default: 4000 x 3000 pixels of noise and edges)"
    rounds = "processes of each contender; ours has one more (default: %(default)s)"
    reference = "also measure one pass of the NumPy reference, and the errors of the model"
    folder = Path(__file__).parent / "results"
    parser.add_argument("--image", type=Path, help=image)
    parser.add_argument("--prompt", default="caption en")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=20, help="new tokens a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help=rounds)
    parser.add_argument("--results", type=Path, default=folder, help="directory of the JSON file")
    parser.add_argument("--reference", action="store_true", help=reference)
    parser.add_argument("--worker", choices=(*CONTENDERS, "reference"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure_reference(args) if args.worker == "reference" else measure(args)))
        return
    ceiling = [measured_limit(args.device)]
    names = [name for name in CONTENDERS if args.device == "cpu" or name != "paligemma torch"]
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in runs:
            runs[name].append(run_worker(name))
        ceiling.append(measured_limit(args.device))
    runs["paligemma"].append(run_worker("paligemma"))  # first and last, to show a drift of the machine
    report(args, statistics.median(ceiling), runs, run_worker("reference") if args.reference else None)


def run_worker(name: str) -> dict:
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "benchmarks.whole_model", *sys.argv[1:], "--worker", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(
    args: argparse.Namespace, read_gb_per_s: float, runs: dict[str, list[dict]], reference: dict | None
) -> None:
    floor_ms = runs["paligemma"][0]["bytes_per_token"] / read_gb_per_s / 1e6
    rows = {}
    for name, measured in runs.items():
        row = {key: statistics.median(run[key] for run in measured) for key in TIMES}
        rows[name] = row | {"times_floor": row["decode_ms"] / floor_ms}
    command = " ".join(["python -m benchmarks.whole_model", *sys.argv[1:]])
    results = {
        "command": command.replace(str(args.model), args.model.name),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name(args.device), "versions": versions(),
        "dtype": args.dtype, "tokens": args.tokens,
        "read_gb_per_s": read_gb_per_s, "decode_floor_ms": floor_ms,
        "median": rows, "runs": runs, "reference": reference,
    }  # fmt: skip
    args.results.mkdir(exist_ok=True)
    path = args.results / f"whole_model-{args.device}-{args.dtype}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    limit = f"reads {read_gb_per_s:.1f} GB/s, so a token takes at least {floor_ms:.0f} ms"
    print(f"{results['device']}, {args.dtype}: {limit}")
    print(f"{'':20} {'load s':>8} {'first token s (cold)':>21} {'ms/token':>9} {'x floor':>8} {'peak GB':>8}")
    for name, row in rows.items():
        first = f"{row['first_token_s']:.2f} ({row['first_token_cold_s']:.2f})"
        columns = f"{row['decode_ms']:9.1f} {row['times_floor']:8.2f} {row['peak_gb']:8.2f}"
        print(f"{name:20} {row['load_s']:8.2f} {first:>21} {columns}")
    said = {tuple(run["tokens"]) for measured in runs.values() for run in measured}
    same = "all tokens agree" if len(said) == 1 else "the tokens differ (bfloat16 ties and rounding)"
    print(f"{same}; each run has at least {min(len(set(tokens)) for tokens in said)} different tokens")
    if reference:
        cost = "one pass of the reference: {seconds:.0f} s, peak {peak_gb:.1f} GB;"
        error = "relative RMS error of the model in float32 {float32_rms:.1e}, in bfloat16 {bfloat16_rms:.1e}"
        print(f"{cost} {error}".format(**reference))
    print(f"wrote {path}")


def measure_reference(args: argparse.Namespace) -> dict:
    """One pass of the NumPy reference, then the distance of the PyTorch model's logits from it in
    two dtypes."""
    import numpy as np

    from paligemma import reference
    from paligemma.processor import Processor

    inputs = Processor.load(args.model).arrays(args.prompt, open_or_make(args.image))
    start = time.perf_counter()
    truth = reference.load(args.model).forward(**inputs)
    result = {"seconds": time.perf_counter() - start, "peak_gb": peak_memory()}

    import torch

    from paligemma import load_hf_model

    for dtype in ("float32", "bfloat16"):
        model, _ = load_hf_model(args.model, device=args.device, dtype=dtype)
        with torch.no_grad():
            logits = model(**{name: torch.from_numpy(x) for name, x in inputs.items()}).cpu().numpy()
        result[f"{dtype}_rms"] = float(np.sqrt(np.mean((logits - truth) ** 2) / np.mean(truth**2)))
    return result


def measure(args: argparse.Namespace) -> dict:
    """One contender in this process: the seconds to load and to the first token (cold, then warm), the
    milliseconds per token, and the peak memory."""
    import torch

    from paligemma.processor import Processor

    # The time of loading does not include the time of importing.
    theirs = "transformers.models.paligemma.modeling_paligemma"
    importlib.import_module("paligemma.loading" if args.worker in BACKENDS else theirs)
    arrays = Processor.load(args.model).arrays(args.prompt, open_or_make(args.image))
    inputs = {name: torch.from_numpy(x) for name, x in arrays.items()}
    start = time.perf_counter()
    generate, bytes_per_token = (load_ours if args.worker in BACKENDS else load_transformers)(args)
    load = time.perf_counter() - start
    first, gaps, tokens = [], [], []
    for _ in range(2):
        start = time.perf_counter()
        tokens, times = generate(inputs)
        first.append(times[0] - start)
        gaps += [b - a for a, b in pairwise(times)]
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else peak_memory()
    return {
        "load_s": load, "first_token_cold_s": first[0], "first_token_s": first[1],
        "decode_ms": 1e3 * statistics.median(gaps), "peak_gb": peak,
        "bytes_per_token": bytes_per_token, "tokens": tokens,
    }  # fmt: skip


def load_ours(args: argparse.Namespace):
    from paligemma import load_hf_model

    model, _ = load_hf_model(args.model, device=args.device, dtype=args.dtype, backend=BACKENDS[args.worker])

    def generate(inputs):
        tokens, times = [], []
        for step in model.stream(**inputs, max_new_tokens=args.tokens, eos_token_id=-1):
            tokens.append(int(step[0]))
            times.append(time.perf_counter())
        return tokens, times

    return generate, sum(parameter.nbytes for parameter in model.language_model.parameters())


def load_transformers(args: argparse.Namespace):
    import torch
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer

    attention = args.worker.split()[1]
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation=attention
    )
    model = model.to(args.device).eval()
    model.generation_config.eos_token_id = None

    class Clock(BaseStreamer):
        def __init__(self):
            self.tokens, self.times = [], []

        def put(self, value):
            if value.numel() == 1:  # the first call hands over the prompt
                self.tokens.append(int(value))
                self.times.append(time.perf_counter())

        def end(self):
            pass

    def generate(inputs):
        clock = Clock()
        # without token types, attention in transformers 5 is causal
        given = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
        given = {name: x.to(args.device) for name, x in given.items()}
        model.generate(**given, max_new_tokens=args.tokens, do_sample=False, streamer=clock)
        return clock.tokens, clock.times

    return generate, sum(p.nbytes for p in model.model.language_model.parameters())


def measured_limit(device: str) -> float:
    """The machine's limit in GB/s: the speed of the sum of 1 GiB."""
    missing = "error: the measurement of the memory's bandwidth needs 2 GiB of free memory"
    return read_bandwidth(device, 1 << 30) or sys.exit(missing)


def open_or_make(path: Path | None):
    import numpy as np
    from PIL import Image

    if path:
        return path
    values = np.random.default_rng(0).integers(0, 60, (3000, 4000, 3), dtype=np.uint8)
    for y in range(0, 3000, 500):
        values[y : y + 500, y % 1000 :: 1000] += 120
    return Image.fromarray(values)


def peak_memory() -> float:
    """The peak of the resident memory of this process, mapped files included, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024 / 1e9


def device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} cores, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    from importlib.metadata import version
    from importlib.util import find_spec

    names = ("torch", "transformers", "numpy", "safetensors", *(["numba"] if find_spec("numba") else []))
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def commit() -> str:
    command, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
