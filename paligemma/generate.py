"""The command line: reads an image and a prompt, streams the answer to stdout, and writes all else to stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --prompt "detect cat ; dog"
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import command
from .answers import prompts
from .command import at_least, probability, say, tell, temperature, utf8
from .engines import reference_engine, torch_engine
from .errors import PaliGemmaError
from .timings import measured, summary

if TYPE_CHECKING:
    from .answers.parsing import Answer, DecodeMasks

MODEL = "google/paligemma-3b-pt-224"  # where neither a model nor an adapter is given
TEMPERATURE = 0.8  # where the prompt does not ask for greedy decoding


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    if sys.stdout is None and not (args.draw or args.masks):
        raise PaliGemmaError(
            "stdout is closed, and the answer is printed there: leave it open, or ask for --draw or --masks"
        )
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
                answer = engine.processor.parse(
                    tokens, image.size, log_probs, bins=args.bins, mask_decoder=mask_decoder(args)
                )
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
    """0, with a hint on stderr, for --task and for prompts whose answers a program reads; otherwise
    TEMPERATURE."""
    if not args.task and not prompts.is_greedy(args.prompt):
        return TEMPERATURE
    reason = f"--task {args.task}" if args.task else f"a prompt that begins with '{args.prompt.split()[0]}'"
    tell(f"hint: {reason} is answered greedily; give --temperature to sample")
    return 0.0


def choose_model(args: argparse.Namespace) -> None:
    """Replace args.adapter by the adapter's directory, and set args.model to its base model if none is
    given."""
    from .checkpoint import hub

    if args.adapter:
        args.adapter = hub.resolve_adapter(args.adapter, local_files_only=args.local_files_only)
        if args.model is None:
            args.model, args.revision = hub.base_model(args.adapter, args.revision)
    args.model = args.model or MODEL


def check_outputs(args: argparse.Namespace) -> None:
    """Raise PaliGemmaError, before the work, for an output that could not be written after it."""
    if args.draw or args.masks:
        from .answers.drawing import check_writable

        if args.draw:
            check_writable(args.draw)
            if args.image != "-" and os.path.exists(args.draw) and os.path.samefile(args.draw, args.image):
                raise PaliGemmaError(f"--draw {args.draw} would overwrite the image: give it another name")
        if args.masks:
            check_writable(args.masks, directory=True)


def mask_decoder(args: argparse.Namespace) -> "DecodeMasks":
    if args.backend == "reference":
        from .reference.mask_decoder import load
    else:
        from .answers.masks import MaskDecoder

        load = MaskDecoder.load
    return load(args.mask_decoder, local_files_only=args.local_files_only)


def report(args: argparse.Namespace, image, answer: "Answer", made: dict) -> None:
    """Write the masks and the picture; print JSON on stdout, or the faults in the answer on stderr."""
    masks: list[Path | None] = [None] * len(answer.objects)
    if args.masks:
        from .answers.drawing import save_mask

        masks = [save_mask(o, Path(args.masks), n) for n, o in enumerate(answer.objects)]
    if args.json:
        objects = [
            {
                "label": o.label,
                "box": o.box,
                "score": o.score and round(o.score, 6),
                **({"mask": str(path)} if path else {}),
            }
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
        from .answers.drawing import draw, save, unreadable

        save(draw(image, answer.objects), args.draw)
        if labels := unreadable(answer.objects):
            missing = f"no font on this machine has every letter of {', '.join(map(repr, labels))}"
            tell(
                f"hint: {missing}, and an empty box is drawn for each that is missing: install one that has them, such as Noto"
            )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m paligemma.generate", description="Answer a prompt about an image with PaliGemma."
    )
    parser.add_argument(
        "--model",
        help=f"hub id, local directory, .npz file of Google's, or demo for the small one in this package (default: the adapter's base, or {MODEL})",
    )
    parser.add_argument("--image", required=True, help="path of the image, or - to read it from stdin")
    parser.add_argument(
        "--prompt",
        type=utf8,
        help="text prompt, such as 'caption en', 'detect cat ; dog' or 'answer en what is this?'; required without --task",
    )
    parser.add_argument(
        "--task",
        choices=tuple(prompts.TASKS),
        help="make the prompt: for detect and segment --prompt is then what to look for, for vqa the question",
    )
    parser.add_argument(
        "--lang", type=utf8, metavar="CODE", help="language of --task caption and vqa (default: en)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=100,
        metavar="N",
        help="most tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=temperature, metavar="X",
        help="sampling temperature; 0 is greedy (default: 0.8; 0 with --task, and for a prompt that begins with detect, segment or ocr)",
    )  # fmt: skip
    parser.add_argument(
        "--top-p",
        type=probability,
        default=0.9,
        metavar="P",
        help="sample from the likeliest tokens, P together (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        metavar="N",
        help="seed for reproducible sampling (default: a new one each time)",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cuda", "cpu"),
        help="where to compute (default: cuda where there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of weights and activations (default: bfloat16; demo: float32; reference: float64)",
    )
    parser.add_argument("--no-sample", action="store_true", help="greedy decoding, as with --temperature 0")
    backends = ("auto", "torch", "numba", "triton", "reference")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=backends,
        help="reference: slow NumPy that defines the numbers (default: triton, the kernels, on a GPU; numba on a CPU where it is installed, else torch)",
    )
    parser.add_argument(
        "--revision",
        help="branch, tag or commit on the hub (default: bfloat16 for that dtype, where there is one, else main)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.model, tokenizer.json or their directory, where they are not beside the weights",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="LoRA adapter to merge into the weights, with its tokenizer if it has one: directory or hub id",
    )
    parser.add_argument(
        "--quantize",
        choices=("int8", "fp8"),
        help="the language model's matrices in 8 bits, which halves their memory",
    )
    parser.add_argument(
        "--full-attention",
        action="store_true",
        help="PaliGemma 2 without its sliding windows, as it was trained",
    )
    parser.add_argument(
        "--local-files-only", action="store_true", help="take a hub id from the cache, without a network"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, why it ended, objects with box and score, token ids, timings",
    )
    parser.add_argument(
        "--draw",
        metavar="FILE",
        help="write the image with boxes, labels and masks to this .png, .jpg or .webp",
    )
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="write each object's mask to a .png of the image's size in this directory",
    )
    parser.add_argument(
        "--mask-decoder", metavar="FILE", help="vae-oid.npz, which masks need (default: fetched on first use)"
    )
    parser.add_argument(
        "--bins",
        type=int,
        default=1024,
        choices=(1024, 1023),
        help="what <loc> counts in: 1023 is Google's evaluator's (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    for name in ("model", "adapter", "tokenizer", "revision", "draw", "masks", "mask_decoder"):
        if getattr(args, name) == "":  # of a shell's variable that is not set
            parser.error(f"--{name.replace('_', '-')} is empty: give a value, or leave the option out")
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
