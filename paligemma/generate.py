"""The command line: an image and a prompt in, the answer on stdout as it is made, everything else on stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --task detect --prompt "cat ; dog" --draw cats.png
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import command, prompts
from .command import probability, say, tell, temperature, utf8, whole
from .errors import PaliGemmaError
from .machine import read_bandwidth

if TYPE_CHECKING:
    from .model import PaliGemma
    from .outputs import Answer, MaskDecoder
    from .processor import Processor

MODEL = "google/paligemma-3b-pt-224"  # where neither a model nor an adapter is given
LIMITED = 1 << 28  # bytes of weights from which memory is what limits a token
TEMPERATURE = 0.8  # where the prompt does not ask for greedy decoding


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    if sys.stdout is None and not (args.draw or args.masks):
        raise PaliGemmaError("stdout is closed, and the answer is printed there: leave it open, or ask for --draw or --masks")
    if args.temperature is None:
        args.temperature = default_temperature(args)
    started = time.perf_counter()
    image = command.read_image(args.image)
    check_outputs(args)
    masked = args.masks or args.mask_decoder or (args.draw and args.prompt.startswith("segment"))
    decoder = mask_decoder(args) if masked else None
    choose_model(args)
    engine = reference_engine(args, image) if args.backend == "reference" else torch_engine(args, image)
    loaded = time.perf_counter()

    text, tokens, times = engine.processor.text_stream(), [], []
    shown = (lambda piece: None) if args.json else say
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
                tell(f"hint: drawn without its masks: {error}")
        ended = tokens[-1] in engine.processor.config.eos_token_ids
        made = {
            "finish_reason": "stop" if ended else "length",
            "tokens": tokens,
            "log_probs": [round(value, 6) for value in log_probs or []],
            "timings": timings,
        }
        report(args, image, answer, made)
    tell(summary(timings))
    return 0


def default_temperature(args: argparse.Namespace) -> float:
    """0 for a task and for prompts whose answers are read by a program, which is told on stderr; otherwise answers are sampled."""
    if not args.task and not prompts.is_greedy(args.prompt):
        return TEMPERATURE
    reason = f"--task {args.task}" if args.task else f"a prompt that begins with '{args.prompt.split()[0]}'"
    tell(f"hint: {reason} is answered greedily; give --temperature to sample")
    return 0.0


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
        size = {"width": image.width, "height": image.height}
        asked = {"model": args.model, "image": size, "prompt": args.prompt}
        command.say_json({**asked, "text": answer.text, "objects": objects, "faults": faults, **made})
    else:
        for part in answer.faults:
            tell(f"no object: {part.text.strip()!r}: {part.fault}")
    if args.draw:
        from .draw import draw, save, unreadable

        save(draw(image, answer.objects), args.draw)
        if labels := unreadable(answer.objects):
            missing = f"no font on this machine has every letter of {', '.join(map(repr, labels))}"
            tell(f"hint: {missing}, and an empty box is drawn for each that is missing: install one that has them, such as Noto")


class Engine(NamedTuple):
    """A model with its input: the tokens of its answer, made one by one, and the way to read them."""

    tokens: Iterator[int]
    log_probs: list  # which grows with them where JSON is asked for
    processor: "Processor"
    bytes_per_token: int = 0  # of weights that one more token reads, where reading them is what takes its time
    vision_seconds: Callable[[], float | None] | None = None  # of the first token's time
    bandwidth: Callable[[], float | None] | None = None  # of this machine, in GB/s
    held_bytes: Callable[[], int] = int  # by caches and graphs for a next answer


def torch_engine(args: argparse.Namespace, image) -> Engine:
    from .weights import load_hf_model

    model, processor = load_hf_model(
        args.model, device=args.device, dtype=args.dtype or "auto", revision=args.revision, local_files_only=args.local_files_only,
        backend=args.backend, tokenizer=args.tokenizer, adapter=args.adapter, quantize=args.quantize, full_attention=args.full_attention,
    )  # fmt: skip
    log_probs = []
    steps = model.stream(
        **processor(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    read = sum(parameter.nbytes for parameter in model.language_model.parameters())
    if "lm_head" in model.language_model._modules:  # the table is there besides the head, and a token reads one row of it
        read -= model.language_model.model.embed_tokens.weight.nbytes
    limited = read >= LIMITED
    bandwidth = partial(read_bandwidth, model.device.type) if limited else None
    tokens = (int(step[0]) for step in steps)
    return Engine(tokens, log_probs, processor, read if limited else 0, vision_watch(model), bandwidth, lambda: model.held_bytes)


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


def reference_engine(args: argparse.Namespace, image) -> Engine:
    from . import hub, reference
    from .processor import Processor
    from .tokenizer import find

    tokenizer = args.tokenizer and find(args.tokenizer)
    if args.adapter:
        hub.check_base(args.model, args.adapter)
    directory = hub.resolve(args.model, dtype=args.dtype or "bfloat16", revision=args.revision, local_files_only=args.local_files_only)
    model = reference.load(directory, dtype=args.dtype or "float64", adapter=args.adapter, full_attention=args.full_attention)
    processor = Processor.load(directory, model.config, tokenizer)
    log_probs = []
    tokens = model.stream(
        **processor.arrays(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    return Engine(tokens, log_probs, processor)


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
    if timings.get("vision_s", 0) >= 0.005:  # of a tiny model it would be 0.00
        line += f" (vision {timings['vision_s']:.2f} s)"
    line += f", {timings['new_tokens']} token" + "s" * (timings["new_tokens"] != 1)
    if "ms_per_token" in timings:
        line += f", {timings['ms_per_token']:.2f} ms each"
        if "weights_gb_per_s" in timings:
            line += f" ({timings['weights_gb_per_s']:.1f} GB/s of weights"
            if "machine_gb_per_s" in timings:
                line += f", {timings['weights_gb_per_s'] / timings['machine_gb_per_s']:.0%} of the {timings['machine_gb_per_s']:.1f} that this machine reads"
            line += ")"
    return line + (f", cache and graphs {timings['held_gb']:.2f} GB" if timings.get("held_gb", 0) >= 0.005 else "")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="python -m paligemma.generate", description="Answer a prompt about an image with PaliGemma.")
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
    parser.add_argument(
        "--temperature", type=temperature, metavar="X",
        help="sampling temperature; 0 is greedy (default: 0.8; 0 with --task, and for a prompt that begins with detect, segment or ocr)",
    )  # fmt: skip
    parser.add_argument("--top-p", type=probability, default=0.9, metavar="P", help="sample from the likeliest tokens, P together (default: %(default)s)")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="seed for reproducible sampling (default: a new one each time)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of weights and activations (default: bfloat16; demo: float32; reference: float64)"
    )
    parser.add_argument("--no-sample", action="store_true", help="greedy decoding, as with --temperature 0")
    backends = ("auto", "torch", "numba", "triton", "reference")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=backends,
        help="reference: slow NumPy that defines the numbers (default: triton, the kernels, on a GPU; numba on a CPU where it is installed, else torch)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub (default: bfloat16 for that dtype, where there is one, else main)")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.model, tokenizer.json or their directory, where they are not beside the weights",
    )
    parser.add_argument("--adapter", metavar="DIR", help="LoRA adapter to merge into the weights: directory or hub id")
    parser.add_argument("--quantize", choices=("int8", "fp8"), help="the language model's matrices in 8 bits, which halves their memory")
    parser.add_argument("--full-attention", action="store_true", help="PaliGemma 2 without its sliding windows, as it was trained")
    parser.add_argument("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, why it ended, objects with box and score, token ids, timings")
    parser.add_argument("--draw", metavar="FILE", help="write the image with boxes, labels and masks to this .png, .jpg or .webp")
    parser.add_argument("--masks", metavar="DIR", help="write each object's mask to a .png of the image's size in this directory")
    parser.add_argument("--mask-decoder", metavar="FILE", help="vae-oid.npz, which masks need (default: fetched on first use)")
    parser.add_argument(
        "--bins", type=int, default=1024, choices=(1024, 1023), help="what <loc> counts in: 1023 is Google's evaluator's (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.no_sample:
        args.temperature = 0.0
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


if __name__ == "__main__":
    command.process(main)
