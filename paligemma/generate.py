"""The command line: an image and a prompt in, the answer on stdout as it is made, everything else on stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --task detect --prompt "cat ; dog" --draw cats.png
"""

import argparse
import io
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import prompts
from .errors import PaliGemmaError

if TYPE_CHECKING:
    from .model import PaliGemma
    from .outputs import Answer, MaskDecoder
    from .processor import Processor

MODEL = "google/paligemma-3b-pt-224"  # where neither a model nor an adapter is given
LIMITED = 1 << 28  # bytes of weights from which memory is what limits a token
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
    check_outputs(args)
    masked = args.masks or args.mask_decoder or (args.draw and args.prompt.startswith("segment"))
    decoder = mask_decoder(args) if masked else None
    choose_model(args)
    engine = reference_engine(args, image) if args.backend == "reference" else torch_engine(args, image)
    loaded = time.perf_counter()

    text, tokens, times = engine.processor.text_stream(), [], []
    shown = (lambda piece: None) if args.json else (lambda piece: print(piece, end="", flush=True))
    try:
        for token in engine.tokens:
            times.append(time.perf_counter())
            tokens.append(token)
            shown(text.push(token))
    finally:
        if tokens:  # Ctrl-C too leaves a whole line
            shown(text.finish() + "\n")

    timings = measured(started, loaded, times, engine)
    if args.json or args.draw or args.masks:
        log_probs = [float(value) for value in engine.log_probs] if args.json else None
        answer = engine.processor.parse(tokens, image.size, log_probs, bins=args.bins, mask_decoder=decoder)
        if args.draw and decoder is None and any(o.codes for o in answer.objects):
            try:
                answer = engine.processor.parse(tokens, image.size, log_probs, bins=args.bins, mask_decoder=mask_decoder(args))
            except PaliGemmaError as error:  # the answer is there, and so are its boxes
                print(f"hint: drawn without its masks: {error}", file=sys.stderr)
        report(args, image, answer, {"tokens": tokens, "log_probs": [round(value, 6) for value in log_probs or []], "timings": timings})
    print(summary(timings), file=sys.stderr)
    return 0


def choose_model(args: argparse.Namespace) -> None:
    """Put what `--adapter` and `--model` stand for in their place: the adapter's directory, and its base model where no model is given."""
    from . import hub

    if args.adapter:
        args.adapter = hub.resolve_adapter(args.adapter, local_files_only=args.local_files_only)
        if args.model is None:
            args.model, args.revision = hub.base_model(args.adapter, args.revision)
    args.model = args.model or MODEL


def check_outputs(args: argparse.Namespace) -> None:
    """Say before the work what could not be written after it."""
    if args.draw or args.masks:
        from .draw import check_writable

        if args.draw:
            check_writable(args.draw)
            if args.image != "-" and os.path.exists(args.draw) and os.path.samefile(args.draw, args.image):
                raise PaliGemmaError(f"--draw {args.draw} would overwrite the image: give it another name")
        if args.masks:
            check_writable(args.masks, directory=True)


def mask_decoder(args: argparse.Namespace) -> "MaskDecoder":
    if args.backend == "reference":
        from .reference.mask_decoder import load
    else:
        from .mask_decoder import MaskDecoder

        load = MaskDecoder.load
    return load(args.mask_decoder, local_files_only=args.local_files_only)


def report(args: argparse.Namespace, image, answer: "Answer", made: dict) -> None:
    """The masks, JSON on stdout or what is wrong with the answer on stderr, and the picture."""
    masks: list[Path | None] = [None] * len(answer.objects)
    if args.masks:
        from .draw import save_mask

        masks = [save_mask(o, Path(args.masks), n) for n, o in enumerate(answer.objects)]
    if args.json:
        objects = [
            {"label": o.label, "box": o.box, "score": o.score and round(o.score, 6), **({"mask": str(path)} if path else {})}
            for o, path in zip(answer.objects, masks, strict=True)
        ]
        faults = [{"text": part.text, "fault": part.fault} for part in answer.faults]
        told = {"model": args.model, "prompt": args.prompt, "text": answer.text, "objects": objects, "faults": faults, **made}
        print(json.dumps(told, ensure_ascii=False), flush=True)
    else:
        for part in answer.faults:
            print(f"no object: {part.text.strip()!r}: {part.fault}", file=sys.stderr)
    if args.draw:
        from .draw import draw, save

        save(draw(image, answer.objects), args.draw)


class Engine(NamedTuple):
    """A model with its input: the tokens of its answer, made one by one, and the way to read them."""

    tokens: Iterator[int]
    log_probs: list  # which grows with them where JSON is asked for
    processor: "Processor"
    bytes_per_token: int = 0  # of weights that one more token reads
    vision_seconds: Callable[[], float | None] | None = None  # of the first token's time
    bandwidth: Callable[[], float | None] | None = None  # of this machine, in GB/s
    held_bytes: Callable[[], int] = int  # by caches and graphs for a next answer


def torch_engine(args: argparse.Namespace, image) -> Engine:
    from .weights import load_hf_model

    model, processor = load_hf_model(
        args.model, device=args.device, dtype=args.dtype or "bfloat16", revision=args.revision, local_files_only=args.local_files_only,
        backend=args.backend, tokenizer=args.tokenizer, adapter=args.adapter, quantize=args.quantize, full_attention=args.full_attention,
    )  # fmt: skip
    log_probs = []
    steps = model.stream(
        **processor(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.no_sample else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    read = sum(parameter.nbytes for parameter in model.language_model.parameters())
    if "lm_head" in model.language_model._modules:  # the table is there besides the head, and a token reads one row of it
        read -= model.language_model.model.embed_tokens.weight.nbytes
    bandwidth = partial(read_bandwidth, model.device.type) if read >= LIMITED else None
    return Engine((int(step[0]) for step in steps), log_probs, processor, read, vision_watch(model), bandwidth, lambda: model.held_bytes)


def vision_watch(model: "PaliGemma") -> Callable[[], float | None]:
    """The seconds from the vision tower's beginning to the projector's end, if both have run."""
    import torch

    def mark() -> Any:
        if model.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = []
    model.vision_tower.vision_model.register_forward_pre_hook(lambda *_: marks.append(mark()))
    model.multi_modal_projector.linear.register_forward_hook(lambda *_: marks.append(mark()))

    def seconds() -> float | None:
        if len(marks) != 2:
            return None
        return marks[1] - marks[0] if model.device.type == "cpu" else marks[0].elapsed_time(marks[1]) / 1e3

    return seconds


def read_bandwidth(device: str) -> float | None:
    """GB/s at which a sum reads 256 MB, of a GPU 1 GB: the best of five. None where these are not free: the answer is there already."""
    import torch

    from .weights import free_memory

    count, seconds = 1 << 26 if device == "cpu" else 1 << 28, []
    free = free_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]
    if free < 8 * count:
        return None
    x = torch.ones(count, device=device)
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds) / 1e9


def reference_engine(args: argparse.Namespace, image) -> Engine:
    from . import hub, reference
    from .processor import Processor

    if args.tokenizer and not os.path.isfile(args.tokenizer):
        raise PaliGemmaError(f"the tokenizer {args.tokenizer} is no file")
    if args.adapter:
        hub.check_base(args.model, args.adapter)
    directory = hub.resolve(args.model, dtype=args.dtype or "bfloat16", revision=args.revision, local_files_only=args.local_files_only)
    model = reference.load(directory, dtype=args.dtype or "float64", adapter=args.adapter, full_attention=args.full_attention)
    processor = Processor.load(directory, model.config, args.tokenizer)
    log_probs = []
    tokens = model.stream(
        **processor.arrays(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.no_sample else args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    return Engine(tokens, log_probs, processor)


def read_image(path: str):
    from .processor import open_image

    if path == "-" and sys.stdin is None:
        raise PaliGemmaError("--image - reads the image from stdin, which is closed")
    return open_image(sys.stdin.buffer.read() if path == "-" else path)


def measured(started: float, loaded: float, times: list[float], engine: Engine) -> dict:
    """Seconds to load and to the first token, and of that in the vision tower; then, where there are more tokens, what each takes, the
    weights read for it, and what this machine reads, where that is the limit."""
    timings = {"load_s": loaded - started, "first_token_s": times[0] - loaded, "new_tokens": len(times)}
    if engine.vision_seconds and (vision := engine.vision_seconds()) is not None:
        timings["vision_s"] = vision
    if len(times) > 1:
        seconds = statistics.median(b - a for a, b in pairwise(times))  # a GPU's second and third token are compiled and recorded
        timings |= {"ms_per_token": 1e3 * seconds, "tokens_per_s": 1 / seconds}
        if engine.bytes_per_token:
            timings["weights_gb_per_s"] = engine.bytes_per_token / seconds / 1e9
        if engine.bandwidth and (bandwidth := engine.bandwidth()):
            timings["machine_gb_per_s"] = bandwidth
    if engine.held_bytes():
        timings["held_gb"] = engine.held_bytes() / 1e9
    return {name: round(value, 3) for name, value in timings.items()}


def summary(timings: dict) -> str:
    line = f"load {timings['load_s']:.2f} s, first token {timings['first_token_s']:.2f} s"
    if "vision_s" in timings:
        line += f" (vision {timings['vision_s']:.2f} s)"
    line += f", {timings['new_tokens']} tokens"
    if "ms_per_token" in timings:
        line += f", {timings['ms_per_token']:.2f} ms each"
        if "weights_gb_per_s" in timings:
            line += f" ({timings['weights_gb_per_s']:.1f} GB/s of weights"
            if "machine_gb_per_s" in timings:
                line += f", {timings['weights_gb_per_s'] / timings['machine_gb_per_s']:.0%} of the {timings['machine_gb_per_s']:.1f} that this machine reads"
            line += ")"
    return line + (f", cache and graphs {timings['held_gb']:.2f} GB" if "held_gb" in timings else "")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m paligemma.generate", description="Answer a prompt about an image with PaliGemma.")
    parser.add_argument(
        "--model",
        help=f"hub id, local directory, .npz file of Google's, or demo for the small one in this package (default: the adapter's base, or {MODEL})",
    )
    parser.add_argument("--image", required=True, help="path of the image, or - to read it from stdin")
    parser.add_argument(
        "--prompt", type=utf8, help="text prompt, such as 'caption en', 'detect cat ; dog' or 'answer en what is this?'; required without --task"
    )
    parser.add_argument(
        "--task", choices=tuple(prompts.TASKS), help="make the prompt: for detect and segment --prompt is then what to look for, for vqa the question"
    )
    parser.add_argument("--lang", type=utf8, metavar="CODE", help="language of --task caption and vqa (default: en)")
    parser.add_argument("--max-new-tokens", type=whole(1), default=100, metavar="N", help="most tokens to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=temperature, metavar="X", help="sampling temperature; 0 is greedy (default: 0.8; with --task 0)")
    parser.add_argument("--top-p", type=probability, default=0.9, metavar="P", help="sample from the likeliest tokens, P together (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="seed for reproducible sampling (default: a new one each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of weights and activations (default: bfloat16; reference: float64)")
    parser.add_argument("--no-sample", action="store_true", help="greedy decoding: what detect, segment and ocr want")
    backends = ("auto", "torch", "numba", "triton", "reference")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=backends,
        help="reference: slow NumPy that defines the numbers (default: triton, the kernels, on a GPU; numba on a CPU where it is installed, else torch)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: bfloat16 for that dtype, where there is one, else main)")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model, where it is not beside the weights (as for an .npz file)")
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to merge into the weights: directory or hub id")
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="the language model's matrices in 8 bits, which halves their memory")
    parser.add_argument("--full-attention", action="store_true", help="PaliGemma 2 without its sliding windows, as it was trained")
    parser.add_argument("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, objects with box and score, token ids, timings")
    parser.add_argument("--draw", metavar="FILE", help="write the image with boxes, labels and masks to this .png, .jpg or .webp")
    parser.add_argument("--masks", metavar="DIR", help="write each object's mask to a .png of the image's size in this directory")
    parser.add_argument("--mask-decoder", metavar="FILE", help="vae-oid.npz, which masks need (default: fetched on first use)")
    parser.add_argument(
        "--bins", type=int, default=1024, choices=(1024, 1023), help="what <loc> counts in: 1023 is Google's evaluator's (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.temperature is None:
        args.temperature = 0.0 if args.task else 0.8
    if args.task:
        try:
            args.prompt = prompts.prompt(args.task, args.prompt, args.lang)
        except PaliGemmaError as error:
            parser.error(f"--task: {error}")
    elif args.prompt is None:
        parser.error("the following arguments are required: --prompt")
    elif args.lang is not None:
        parser.error("--lang goes with --task; a prompt says its language itself, such as 'caption en'")
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
