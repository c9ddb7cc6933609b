"""The command line: an image and a prompt in, the answer on stdout as it is made, everything else on stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --prompt "detect cat" --no-sample
"""

import argparse
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .errors import PaliGemmaError

if TYPE_CHECKING:
    from .processor import TextStream

GREEDY_TASKS = ("detect", "segment", "ocr")  # their answers are read by a program: the most probable one is wanted


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parse_args(argv))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (PaliGemmaError, MemoryError) as error:
        message = str(error) or "out of memory: --dtype bfloat16 takes the least"
    except RuntimeError as error:  # torch's way to say so, on either device
        if "tried to allocate" not in str(error).lower():
            raise
        message = f"out of memory: {str(error).splitlines()[0]}"
    except OSError as error:
        message = str(error)
        if sys.stdout:  # it may be stdout that cannot be written: a full disk, a reader who has gone; nor can what is buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 1
    print(f"error: {message}", file=sys.stderr)
    return 1


def run(args: argparse.Namespace) -> int:
    if not args.no_sample and args.temperature > 0 and args.prompt.split(" ")[0] in GREEDY_TASKS:
        print(f"hint: '{args.prompt.split(' ')[0]}' is best answered without sampling: add --no-sample", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that cannot show every character
    started = time.perf_counter()
    image = read_image(args.image)
    engine = reference_engine(args, image) if args.backend == "reference" else torch_engine(args, image)
    loaded = time.perf_counter()

    text, tokens, times = engine.text_stream, [], []
    shown = (lambda piece: None) if args.json else (lambda piece: print(piece, end="", flush=True))
    try:
        for token in engine.tokens:
            times.append(time.perf_counter())
            tokens.append(token)
            shown(text.push(token))
    finally:
        if tokens:  # Ctrl-C too leaves a whole line
            shown(text.finish() + "\n")

    timings = measured(started, loaded, times, engine.bytes_per_token)
    if args.json:
        print(json.dumps({"model": args.model, "prompt": args.prompt, "text": text.text, "tokens": tokens, "timings": timings}, ensure_ascii=False), flush=True)
    print(summary(timings), file=sys.stderr)
    return 0


class Engine(NamedTuple):
    """A model with its input: the tokens of its answer, made one by one, and the way to read them."""

    tokens: Iterator[int]
    text_stream: "TextStream"
    bytes_per_token: int  # of weights that one more token reads


def torch_engine(args: argparse.Namespace, image) -> Engine:
    from .processor import TextStream
    from .weights import load_hf_model

    model, processor = load_hf_model(
        args.model, device=args.device, dtype=args.dtype or "bfloat16", revision=args.revision, local_files_only=args.local_files_only,
        backend=args.backend, tokenizer=args.tokenizer, adapter=args.adapter, quantize=args.quantize, full_attention=args.full_attention,
    )  # fmt: skip
    steps = model.stream(
        **processor(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.no_sample else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    read = sum(parameter.nbytes for parameter in model.language_model.parameters())
    if args.quantize:  # the table is there besides its copy, and a token reads one row of it
        read -= model.language_model.model.embed_tokens.weight.nbytes
    return Engine((int(step[0]) for step in steps), TextStream(processor.tokenizer), read)


def reference_engine(args: argparse.Namespace, image) -> Engine:
    from . import hub, reference
    from .processor import Processor, TextStream

    directory = hub.resolve(args.model, dtype=args.dtype or "bfloat16", revision=args.revision, local_files_only=args.local_files_only)
    adapter = args.adapter and hub.resolve_adapter(args.adapter, local_files_only=args.local_files_only)
    model = reference.load(directory, dtype=args.dtype or "float64", adapter=adapter, full_attention=args.full_attention)
    processor = Processor.load(directory, model.config, args.tokenizer)
    tokens = model.stream(
        **processor.arrays(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.no_sample else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    return Engine(tokens, TextStream(processor.tokenizer), 0)


def read_image(path: str):
    from .processor import open_image

    if path == "-" and sys.stdin is None:
        raise PaliGemmaError("--image - reads the image from stdin, which is closed")
    return open_image(sys.stdin.buffer.read() if path == "-" else path)


def measured(started: float, loaded: float, times: list[float], bytes_per_token: int) -> dict:
    """Seconds to load and to the first token; then, where there are more tokens, their rate and the weights read for it."""
    timings = {"load_s": loaded - started, "first_token_s": times[0] - loaded, "new_tokens": len(times)}
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        timings |= {"tokens_per_s": rate, "weights_gb_per_s": rate * bytes_per_token / 1e9}
    return {name: round(value, 3) for name, value in timings.items()}


def summary(timings: dict) -> str:
    line = f"load {timings['load_s']:.2f} s, first token {timings['first_token_s']:.2f} s, {timings['new_tokens']} tokens"
    if "tokens_per_s" in timings:
        line += f", {timings['tokens_per_s']:.2f} tokens/s"
        if timings["weights_gb_per_s"]:
            line += f" ({timings['weights_gb_per_s']:.1f} GB/s of weights)"
    return line


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paligemma.generate", description="Answer a prompt about an image with PaliGemma.")
    parser.add_argument(
        "--model",
        default="google/paligemma-3b-pt-224",
        help="hub id, local directory, .npz file of Google's, or demo for the small one in this package (default: %(default)s)",
    )
    parser.add_argument("--image", required=True, help="path of the image, or - to read it from stdin")
    parser.add_argument("--prompt", type=utf8, required=True, help="text prompt, such as 'caption en', 'detect cat ; dog' or 'answer en what is this?'")
    parser.add_argument("--max-new-tokens", type=whole(1), default=100, metavar="N", help="most tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=temperature, default=0.8, metavar="X", help="sampling temperature; 0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=probability, default=0.9, metavar="P", help="sample from the likeliest tokens, P together (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="seed for reproducible sampling (default: a new one each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of weights and activations (default: bfloat16; reference: float64)")
    parser.add_argument("--no-sample", action="store_true", help="greedy decoding: what detect, segment and ocr want")
    backends = ("auto", "torch", "triton", "reference")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=backends,
        help="reference: slow NumPy that defines the numbers (default: triton, the kernels, on a GPU; torch on a CPU)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: bfloat16 for that dtype, where there is one, else main)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, where it is not beside the weights (as for an .npz file)")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to merge into the weights: directory or hub id")
    parser.add_argument("--quantize", choices=("int8",), help="the language model's matrices in 8 bits: about half the memory")
    parser.add_argument("--full-attention", action="store_true", help="PaliGemma 2 without its sliding windows, as it was trained")
    parser.add_argument("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, token ids, timings")
    args = parser.parse_args(argv)
    if args.backend == "reference" and args.device == "cuda":
        parser.error("--backend reference computes on the CPU; leave out --device cuda")
    if args.backend == "reference" and args.quantize:
        parser.error("--backend reference defines the unquantised numbers; leave out --quantize")
    return args


def whole(least: int):
    def number(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def temperature(text: str) -> float:
    value = _float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 (greedy) or a positive number")
    return value


def probability(text: str) -> float:
    value = _float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def interrupted(*_) -> None:
    """The first Ctrl-C ends the work in good order, which a download can draw out; the second one ends it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main())
