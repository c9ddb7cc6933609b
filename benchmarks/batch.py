"""Times many images: one after another, in rows that are refilled, in batches of a fixed size, and by
transformers in batches, on the same inputs in one run.

    python -m benchmarks.batch --model demo --rows 128 --batch-size 1 4 16
    python -m benchmarks.batch --model checkpoints/random-3b --rows 12 --batch-size 8

Answers have different lengths: each row ends after a number of tokens that is drawn, and no token ends it. A
fixed batch ends with its longest answer. Rows of a fixed batch have prompts of similar lengths, as a program
that knows the prompts beforehand would group them. Each contender runs in a process of its own, and pictures
are prepared before the clock starts. The command writes benchmarks/results/batch-MODEL-DEVICE-DTYPE-DATE.json
and prints a table."""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.whole_model import commit, device_name, measured_limit, peak_memory, versions

PROMPTS = (
    "caption en",
    "detect red circle",
    "detect star ; blue square",
    "answer en what is in the picture?",
)


class Asked(NamedTuple):
    inputs: dict[str, Any]  # of one row
    tokens: int  # the number of new tokens


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description="Time many images.")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--model", required=True, help="checkpoint directory, or demo")
    parser.add_argument("--rows", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8], help="(default: 8)")
    parser.add_argument("--tokens", type=int, nargs=2, default=[8, 40], metavar=("LEAST", "MOST"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--without-transformers", action="store_true")
    parser.add_argument("--results", type=Path, default=folder, help="directory of the JSON file")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args, args.worker[0], int(args.worker[1]))))
        return 0
    theirs = [] if args.without_transformers else ["transformers"]
    jobs = [("one by one", 1)]
    jobs += [(name, size) for size in args.batch_size for name in ("refilled", "fixed", *theirs)]
    limits, found = [measured_limit(args.device)], []
    for name, size in [*jobs, jobs[0]]:  # first and last, to show a drift of the machine
        print(f"{name}, {size} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.batch", *sys.argv[1:], "--worker", name, str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found.append({"name": name, "size": size, **json.loads(done.stdout.splitlines()[-1])})
        limits.append(measured_limit(args.device))
    report(args, statistics.median(limits), found)
    return 0


def report(args: argparse.Namespace, read_gb_per_s: float, found: list[dict]) -> None:
    model, floor_ms = Path(args.model).name, found[0]["bytes_per_step"] / read_gb_per_s / 1e6
    dtype = found[0]["dtype"]
    results = {
        "command": " ".join(["python -m benchmarks.batch", *sys.argv[1:]]).replace(args.model, model),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name(args.device), "versions": versions(), "model": model, "dtype": dtype,
        "rows": args.rows, "tokens": args.tokens, "read_gb_per_s": read_gb_per_s, "step_floor_ms": floor_ms,
        "runs": found,
    }  # fmt: skip
    args.results.mkdir(exist_ok=True)
    path = args.results / f"batch-{model}-{args.device}-{dtype}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    limit = f"reads {read_gb_per_s:.1f} GB/s: a step takes at least {floor_ms:.2f} ms"
    print(f"{results['device']}, {model}, {dtype}: {limit}")
    heads = f"{'images/s':>9} {'tokens/s':>9} {'prefill s':>10} {'ms/step':>8} {'GB':>6}"
    print(f"{'':14} {'rows':>4} {'s':>8} {heads}")
    for run in found:
        rates = f"{args.rows / run['seconds']:9.3f} {run['new_tokens'] / run['seconds']:9.1f}"
        split = f"{run['prefill_s']:10.2f} {run['step_ms']:8.1f}" if "step_ms" in run else " " * 19
        print(f"{run['name']:14} {run['size']:4} {run['seconds']:8.2f} {rates} {split} {run['peak_gb']:6.2f}")
    same = {run["answers"] for run in found}
    print("all answers agree" if len(same) == 1 else "the answers differ (ties and rounding)")
    print(f"wrote {path}")


def measure(args: argparse.Namespace, name: str, size: int) -> dict:
    import torch

    from paligemma import load_hf_model
    from paligemma.processor import Processor

    theirs = name == "transformers"
    model: Any
    if theirs:
        model, processor, dtype = load_transformers(args)
    else:
        model, processor = load_hf_model(args.model, device=args.device, dtype=args.dtype)
        dtype = model.dtype
    assert isinstance(processor, Processor)
    asked, ways = questions(args, processor), {"refilled": refilled, "fixed": fixed, "transformers": batched}
    ways["one by one"] = one_by_one
    short = [row._replace(tokens=2) for row in asked[: min(2, size)]]
    ways[name](model, short, size)  # compiles kernels, touches the weights
    start = time.perf_counter()
    tokens, split = ways[name](model, asked, size)
    seconds = time.perf_counter() - start
    decoder = model.model.language_model if theirs else model.language_model
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else peak_memory()
    return {
        "seconds": seconds, "new_tokens": sum(map(len, tokens)), **split, "peak_gb": peak,
        "bytes_per_step": sum(p.nbytes for p in decoder.parameters()), "dtype": str(dtype).split(".")[1],
        "answers": hashlib.sha256(str(tokens).encode()).hexdigest()[:16],
    }  # fmt: skip


def questions(args: argparse.Namespace, processor) -> list[Asked]:
    """Pictures of noise and edges, prompts of different lengths, answers of drawn lengths."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(args.rows):
        values = rng.integers(0, 60, (480, 640, 3), dtype=np.uint8)
        values[:, :: 2 + n % 9] += 120
        inputs = processor(PROMPTS[n % len(PROMPTS)], values)
        found.append(Asked(inputs, int(rng.integers(args.tokens[0], args.tokens[1] + 1))))
    return found


def one_by_one(model, asked: list[Asked], size: int) -> tuple[list[list[int]], dict]:
    rows, prefill, steps = [], 0.0, []
    for inputs, count in asked:
        times, row = [time.perf_counter()], []
        for column in model.stream(**inputs, max_new_tokens=count, eos_token_id=-1):
            row.append(int(column[0]))
            times.append(time.perf_counter())
        rows.append(row)
        prefill += times[1] - times[0]
        steps += [b - a for a, b in pairwise(times[1:])]
    return rows, {"prefill_s": prefill, "step_ms": 1e3 * statistics.median(steps)}


def refilled(model, asked: list[Asked], size: int) -> tuple[list[list[int]], dict]:
    from paligemma.rows import Rows

    rows = Rows(model, size)
    given = [rows.submit(n, inputs, count, eos_token_id=-1) for n, (inputs, count) in enumerate(asked)]
    begun, full = [], []  # seconds of the steps that begin rows, and of those of all rows in use
    while rows.busy:
        waiting, live, start = len(rows.waiting), rows.slots - rows.live.count(None), time.perf_counter()
        rows.step()
        seconds = time.perf_counter() - start
        if len(rows.waiting) < waiting:
            begun.append(seconds)
        elif live == min(size, len(asked)):
            full.append(seconds)
    step = statistics.median(full or [0])
    prefill = sum(begun) - step * len(begun)  # these steps decode too
    return [row.tokens for row in given], {"prefill_s": prefill, "step_ms": 1e3 * step}


def fixed(model, asked: list[Asked], size: int) -> tuple[list[list[int]], dict]:
    rows: dict[int, list[int]] = {}
    prefill, steps = 0.0, []
    for part in parts(asked, size):
        times, most = [time.perf_counter()], max(asked[n].tokens for n in part)
        for column in model.stream(**padded([asked[n] for n in part]), max_new_tokens=most, eos_token_id=-1):
            for n, token in zip(part, column.tolist(), strict=True):
                rows.setdefault(n, []).append(token)
            times.append(time.perf_counter())
        prefill += times[1] - times[0]
        steps += [b - a for a, b in pairwise(times[1:])]
    cut = [rows[n][:count] for n, (_, count) in enumerate(asked)]
    return cut, {"prefill_s": prefill, "step_ms": 1e3 * statistics.median(steps)}


def parts(asked: list[Asked], size: int) -> list[list[int]]:
    """The rows of each batch: prompts of similar lengths together."""
    order = sorted(range(len(asked)), key=lambda n: asked[n].inputs["input_ids"].shape[1])
    return [order[n : n + size] for n in range(0, len(order), size)]


def padded(asked: list[Asked]) -> dict[str, Any]:
    """The inputs of a batch, padded on the left."""
    import torch
    import torch.nn.functional as F

    T = max(row.inputs["input_ids"].shape[1] for row in asked)
    ids = [F.pad(r.inputs["input_ids"], (T - r.inputs["input_ids"].shape[1], 0)) for r in asked]
    masks = [F.pad(r.inputs["attention_mask"], (T - r.inputs["attention_mask"].shape[1], 0)) for r in asked]
    pixels = torch.cat([r.inputs["pixel_values"] for r in asked])
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks), "pixel_values": pixels}


def load_transformers(args: argparse.Namespace):
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    from paligemma.backend import choose_dtype
    from paligemma.checkpoint import hub
    from paligemma.processor import Processor

    directory, dtype = hub.resolve(args.model), choose_dtype(args.dtype, args.model)
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa"
    )
    model.generation_config.eos_token_id = None
    model.requires_grad_(False)
    assert isinstance(dtype, torch.dtype)
    return model.to(args.device).eval(), Processor.load(directory), dtype


def batched(model, asked: list[Asked], size: int) -> tuple[list[list[int]], dict]:
    """By transformers, in the batches of `fixed`."""
    import torch

    rows: dict[int, list[int]] = {}
    for part in parts(asked, size):
        inputs = padded([asked[n] for n in part])
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])  # without them attention is causal
        inputs = {name: x.to(model.device) for name, x in inputs.items()}
        most = max(asked[n].tokens for n in part)
        ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)[:, -most:]
        rows |= {n: row[: asked[n].tokens] for n, row in zip(part, ids.tolist(), strict=True)}
    return [rows[n] for n in range(len(asked))], {}


if __name__ == "__main__":
    sys.exit(main())
