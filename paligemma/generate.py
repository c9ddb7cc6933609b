"""The command line: reads an image and a prompt, streams the answer to stdout, and writes the rest to stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --prompt "detect cat ; dog"
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import command, pictures
from .answers import prompts
from .command import at_least, probability, say, tell, temperature, utf8
from .engines import reference_engine, torch_engine
from .errors import PaliGemmaError
from .timings import measured, summary

if TYPE_CHECKING:
    from .answers.parsing import Answer, DecodeMasks

MODEL = "google/paligemma-3b-pt-224"  # the default without --model and without --adapter
FRAMES = 16  # of a video, as Google's checkpoints for videos were trained
TEMPERATURE = 0.8  # the default for prompts that are not answered greedily


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    if sys.stdout is None and not (args.draw or args.masks):
        closed = "stdout is closed, and the answer is printed there"
        raise PaliGemmaError(f"{closed}: leave it open, or give --draw or --masks")
    if args.temperature is None:
        args.temperature = default_temperature(args)
    started = time.perf_counter()
    images = pictures.read_images(args.image) if args.image else pictures.read_video(args.video, args.frames)
    check_outputs(args)
    masked = args.masks or args.mask_decoder or (args.draw and args.prompt.startswith("segment"))
    decoder = mask_decoder(args) if masked else None
    choose_model(args)
    engine = reference_engine(args, images) if args.backend == "reference" else torch_engine(args, images)
    loaded = time.perf_counter()

    text, tokens, times = engine.processor.text_stream(), [], []
    shown = (lambda piece: None) if args.json else say
    try:
        for token in engine.tokens:
            times.append(time.perf_counter())
            tokens.append(token)
            shown(text.push(token))
    finally:
        if tokens:  # the line is ended after Ctrl-C too
            shown(text.finish() + "\n")

    timings = measured(started, loaded, times, engine)
    if args.json or args.draw or args.masks:
        log_probs = [float(value) for value in engine.log_probs] if args.json else None

        def parse(decoder: "DecodeMasks | None") -> "Answer":
            size = images[0].size  # boxes refer to the first image
            return engine.processor.parse(tokens, size, log_probs, bins=args.bins, mask_decoder=decoder)

        answer = parse(decoder)
        if args.draw and decoder is None and any(o.codes for o in answer.objects):
            try:
                answer = parse(mask_decoder(args))
            except PaliGemmaError as error:  # the boxes can be drawn without the masks
                tell(f"hint: the picture is drawn without masks: {error}")
        ended = tokens[-1] in engine.processor.config.eos_token_ids
        rounded = [round(value, 6) for value in log_probs or []]
        details = {"finish_reason": "stop" if ended else "length", "tokens": tokens, "log_probs": rounded}
        report(args, images, answer, details | {"timings": timings})
    tell(summary(timings))
    return 0


def default_temperature(args: argparse.Namespace) -> float:
    """0, with a hint on stderr, for --task and for prompts of tasks that are answered greedily; otherwise
    TEMPERATURE."""
    if not args.task and not prompts.is_greedy(args.prompt):
        return TEMPERATURE
    reason = f"--task {args.task}" if args.task else f"a prompt that begins with '{args.prompt.split()[0]}'"
    tell(f"hint: {reason} is answered greedily; give --temperature to sample")
    return 0.0


def choose_model(args: argparse.Namespace) -> None:
    """Replace args.adapter by the adapter's directory; set args.model to its base model if none is given."""
    from .checkpoint import hub

    if args.adapter:
        args.adapter = hub.resolve_adapter(args.adapter, local_files_only=args.local_files_only)
        if args.model is None:
            args.model, args.revision = hub.base_model(args.adapter, args.revision)
    args.model = args.model or MODEL


def check_outputs(args: argparse.Namespace) -> None:
    """Raise PaliGemmaError, before any work is done, for an output file that cannot be written."""
    if args.draw or args.masks:
        from .answers.drawing import check_writable

        if args.draw:
            check_writable(args.draw)
            path = args.image[0] if args.image else args.video
            if path != "-" and os.path.exists(args.draw) and os.path.samefile(args.draw, path):
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


def report(args: argparse.Namespace, images: list, answer: "Answer", details: dict) -> None:
    """Write the masks and the picture; print JSON on stdout, or the faults of the answer on stderr."""
    masks: list[Path | None] = [None] * len(answer.objects)
    if args.masks:
        from .answers.drawing import save_mask

        masks = [save_mask(o, Path(args.masks), n) for n, o in enumerate(answer.objects)]
    if args.json:
        objects = []
        for o, path in zip(answer.objects, masks, strict=True):
            scores = {"score": o.score, "box_score": o.box_score, "label_score": o.label_score}
            found = {"label": o.label, "box": o.box} | {k: v and round(v, 6) for k, v in scores.items()}
            objects.append(found | ({"mask": str(path)} if path else {}))
        faults = [{"text": part.text, "fault": part.fault} for part in answer.faults]
        sizes = [{"width": image.width, "height": image.height} for image in images]
        shown = {"image": sizes[0]} if len(sizes) == 1 else {"images": sizes}
        asked = {"model": args.model, **shown, "prompt": args.prompt}
        command.say_json({**asked, "text": answer.text, "objects": objects, "faults": faults, **details})
    else:
        for part in answer.faults:
            tell(f"no object: {part.text.strip()!r}: {part.fault}")
    if args.draw:
        from .answers.drawing import draw, save, unreadable

        save(draw(images[0], answer.objects), args.draw)
        if labels := unreadable(answer.objects):
            missing = f"no font on this machine has every letter of {', '.join(map(repr, labels))}"
            tell(
                f"hint: {missing}, and missing letters are empty boxes: install such a font, for example Noto"
            )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    for name in ("model", "video", "adapter", "tokenizer", "revision", "draw", "masks", "mask_decoder"):
        if getattr(args, name) == "":  # from a shell variable that is not set
            parser.error(f"--{name.replace('_', '-')} is empty: give a value, or leave the option out")
    if args.frames and not args.video:
        parser.error("--frames goes with --video")
    args.frames = args.frames or FRAMES
    if (count := len(args.image) if args.image else args.frames) > 1 and (args.draw or args.masks):
        parser.error(f"--draw and --masks are for one image, and one prompt is about {count}: leave them out")
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
        parser.error("--lang goes with --task; without it, write the language in the prompt ('caption en')")
    if args.backend == "reference" and args.device == "cuda":
        parser.error("--backend reference computes on the CPU; leave out --device cuda")
    if args.backend == "reference" and args.quantize:
        parser.error("--backend reference defines the unquantised numbers; leave out --quantize")
    return args


def option_parser() -> command.Parser:
    about = "Answer a prompt about an image with PaliGemma."
    parser = command.Parser(prog="python -m paligemma.generate", description=about)
    add = parser.add_argument
    dtypes = ("float32", "float16", "bfloat16")
    backends = ("auto", "torch", "numba", "triton", "reference")
    # fmt: off
    add("--model", help="hub id, local directory, one of Google's .npz files, or demo for the small model in "
        f"this package (default: the adapter's base model, or {MODEL})")
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--image", nargs="+", action="extend", metavar="PATH",
        help="path of the image, or - to read it from stdin; several for one prompt about all of them")
    either.add_argument("--video", metavar="PATH", help="path of a video, or -, instead of images; "
        "needs the package av")
    add("--frames", type=at_least(1), metavar="N",
        help=f"how many frames of --video to take, evenly spaced over the whole of it (default: {FRAMES})")
    add("--prompt", type=utf8, help="text prompt, such as 'caption en', 'detect cat ; dog' or "
        "'answer en what is this?'; required without --task")
    add("--task", choices=tuple(prompts.TASKS), help="write the prompt of this task; --prompt is then what "
        "to look for (detect, segment) or the question (vqa)")
    add("--lang", type=utf8, metavar="CODE", help="language of --task caption and vqa (default: en)")
    add("--max-new-tokens", type=at_least(1), default=100, metavar="N",
        help="largest number of tokens to generate (default: %(default)s)")
    add("--temperature", type=temperature, metavar="X", help="sampling temperature; 0 is greedy (default: "
        "0.8; 0 with --task, and for a prompt that begins with detect, segment or ocr)")
    add("--top-p", type=probability, default=0.9, metavar="P",
        help="sample from the most probable tokens that together have probability P (default: %(default)s)")
    add("--seed", type=at_least(0), metavar="N",
        help="seed for reproducible sampling (default: a new one each time)")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="where to compute (default: cuda if there is a GPU, else cpu)")
    add("--dtype", choices=dtypes,
        help="dtype of weights and activations (default: bfloat16; demo: float32; reference: float64)")
    add("--no-sample", action="store_true", help="greedy decoding, as with --temperature 0")
    add("--backend", default="auto", choices=backends, help="reference: slow NumPy that defines the numbers "
        "(default: triton, the kernels, on a GPU; numba on a CPU where it is installed, else torch)")
    add("--revision", help="branch, tag or commit on the hub (default: bfloat16 or float16 to match --dtype, "
        "if it exists, else main)")
    add("--tokenizer", metavar="PATH",
        help="tokenizer.model, tokenizer.json or their directory, if they are not beside the weights")
    add("--adapter", metavar="DIR", help="LoRA adapter to merge into the weights, with its tokenizer if it "
        "has one: directory or hub id")
    add("--quantize", choices=("int8", "fp8"),
        help="store the language model's matrices in 8 bits, which halves their memory")
    add("--full-attention", action="store_true",
        help="PaliGemma 2 without its sliding windows, as it was trained")
    add("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")
    add("--json", action="store_true", help="print one JSON object: text, why it ended, objects with box and "
        "score, token ids, timings")
    add("--draw", metavar="FILE",
        help="write the image with boxes, labels and masks to this .png, .jpg or .webp")
    add("--masks", metavar="DIR",
        help="write each object's mask to a .png of the image's size in this directory")
    add("--mask-decoder", metavar="FILE",
        help="vae-oid.npz, which masks need (default: downloaded on first use)")
    add("--bins", type=int, default=1024, choices=(1024, 1023), help="number of <loc> bins on a side of the "
        "image; 1023 is what Google's evaluator uses (default: %(default)s)")
    # fmt: on
    return parser


if __name__ == "__main__":
    command.process(main)
