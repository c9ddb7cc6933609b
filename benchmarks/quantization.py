"""Compares 8-bit and 4-bit weights with bfloat16, in accuracy and speed, in one run.

    python -m benchmarks.quantization --model DIR [--only bfloat16 int4]
    python -m benchmarks.quantization --formats

For a checkpoint of true shape it reports the relative error of the logits, the fraction of greedy tokens that
agree, and the milliseconds per token; for the demo model, the scores with each kind of weights. It writes
benchmarks/results/quantization-DEVICE-MODEL-DATE.json and prints the numbers. The second compares the error
of int4's numbers with that of other 4-bit formats, and of torchao's if it is installed."""

import argparse
import json
import statistics
import time
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

import torch

from paligemma import load_hf_model
from paligemma.demo.evaluate import answers, held_out, score, trials
from paligemma.layers import QUANTIZED

from . import four_bits
from .whole_model import commit, device_name, measured_limit, open_or_make, versions

KINDS = {"bfloat16": None} | {name: name for name in QUANTIZED}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description="Measure int8, fp8 and int4 beside bfloat16."
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--model", type=Path, help="checkpoint directory")
    mode.add_argument("--formats", action="store_true", help="the error of 4-bit formats alone, printed")
    parser.add_argument("--only", nargs="+", choices=KINDS, help="kinds of weights (default: all)")
    parser.add_argument("--image", type=Path, help="an image file (default: noise and edges)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tokens", type=int, default=24, help="new tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="for the demo model (default: %(default)s)")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=folder, help="directory of the JSON file")
    args = parser.parse_args()
    if args.formats:
        print(four_bits.table(four_bits.measured()))
        return 0
    args.kinds = {name: KINDS[name] for name in dict.fromkeys(["bfloat16", *(args.only or KINDS)])}
    results = {
        "command": f"python -m benchmarks.quantization --model {args.model.name}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name(args.device), "versions": versions(),
        "read_gb_per_s": measured_limit(args.device), "model": args.model.name,
        "true_shape": shape(args), "demo": demo(args),
    }  # fmt: skip
    args.results.mkdir(exist_ok=True)
    path = args.results / f"quantization-{args.device}-{args.model.name}-{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["true_shape"] | results["demo"], indent=1))
    print(f"wrote {path}")
    return 0


@torch.no_grad()
def shape(args: argparse.Namespace) -> dict:
    """The speed and the accuracy of the checkpoint."""
    models = {
        name: load_hf_model(args.model, device=args.device, quantize=quantize)
        for name, quantize in args.kinds.items()
    }
    inputs = models["bfloat16"][1]("caption en", open_or_make(args.image))
    gaps, said = {name: [] for name in args.kinds}, {}
    for _ in range(args.rounds):
        for name, (model, _) in models.items():
            tokens, times = [], []
            for step in model.stream(**inputs, max_new_tokens=args.tokens, eos_token_id=-1):
                tokens.append(int(step[0]))
                times.append(time.perf_counter())
            gaps[name] += [b - a for a, b in pairwise(times)]
            said[name] = tokens
    logits = {name: follow(model, inputs, said["bfloat16"]) for name, (model, _) in models.items()}
    plain = logits["bfloat16"]
    error, agree, others = {}, {}, [name for name in args.kinds if name != "bfloat16"]
    for name in others:
        error[name] = float((logits[name] - plain).square().mean().sqrt() / plain.square().mean().sqrt())
        agree[name] = float((logits[name].argmax(-1) == plain.argmax(-1)).float().mean())
    ms = {name: 1e3 * statistics.median(values) for name, values in gaps.items()}
    language = {name: model.language_model for name, (model, _) in models.items()}
    return {
        "ms_per_token": ms, "times_as_fast": {name: ms["bfloat16"] / ms[name] for name in others},
        "language_model_bytes": {name: sum(p.nbytes for p in x.parameters()) for name, x in language.items()},
        "logits_relative_rms": error, "greedy_agreement_given_the_same_text": agree, "tokens": args.tokens,
    }  # fmt: skip


def follow(model, inputs: dict, tokens: list[int]) -> torch.Tensor:  # -> (tokens, V)
    """The logits that predict each of the tokens, given the tokens before it."""
    ids, answer = inputs["input_ids"], torch.tensor([tokens])
    types = torch.cat([torch.zeros_like(ids), torch.ones_like(answer)], dim=1)
    logits = model(torch.cat([ids, answer], dim=1), inputs["pixel_values"], token_type_ids=types)
    return logits[0, ids.shape[1] - 1 : -1].cpu()


def demo(args: argparse.Namespace) -> dict:
    """The scores of the demo model, and the fraction of its answers that are the same with the weights as
    they are."""
    asked = trials(held_out(args.scenes, 1), 1)
    said = {
        name: answers(*load_hf_model("demo", device=args.device, quantize=quantize), asked)
        for name, quantize in args.kinds.items()
    }
    same = {}
    for name in said:
        same[name] = sum(a == b for a, b in zip(said[name], said["bfloat16"], strict=True)) / len(asked)
    scores = {name: score(asked, texts) for name, texts in said.items()}
    return {"demo_scores": scores, "demo_same_answers": same, "demo_prompts": len(asked)}


if __name__ == "__main__":
    raise SystemExit(main())
