"""The command line: reads an image and a prompt, streams the answer to stdout, and writes the rest to stderr.

python -m paligemma.generate --model google/paligemma-3b-mix-224 --image cat.jpg --prompt "detect cat ; dog"
"""

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import arguments, command, pictures
from .arguments import TEMPERATURE, choose_model
from .command import at_least, say, tell
from .engines import reference_engine, torch_engine
from .errors import PaliGemmaError
from .timings import measured, summary

if TYPE_CHECKING:
    from .answers.parsing import Answer, DecodeMasks

FRAMES = 16  # of a video, as Google's checkpoints for videos were trained


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    if sys.stdout is None and not (args.draw or args.masks):
        closed = "stdout is closed, and the answer is printed there"
        raise PaliGemmaError(f"{closed}: leave it open, or give --draw or --masks")
    if args.temperature is None:
        args.temperature = default_temperature(args)
    started = time.perf_counter()
    for path in args.image or [args.video]:
        refuse_url("image" if args.image else "video", path)
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
        from .answers.record import details

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
        more = details(tokens, log_probs or []) | {"timings": timings}
        report(args, images, answer, "stop" if ended else "length", more)
    tell(summary(timings))
    return 0


def refuse_url(kind: str, path: str) -> None:
    if path.lower().startswith(("http://", "https://")):
        piped = f"curl -fL {shlex.quote(path)} | python -m paligemma.generate --{kind} - ..."
        raise PaliGemmaError(f"--{kind} is a URL, and URLs are not fetched; pipe it: {piped}")


def default_temperature(args: argparse.Namespace) -> float:
    """0, with a hint on stderr, for --task and for prompts of tasks that are answered greedily; otherwise
    TEMPERATURE."""
    if not arguments.is_greedy(args.task, args.prompt):
        return TEMPERATURE
    reason = f"--task {args.task}" if args.task else f"a prompt that begins with '{args.prompt.split()[0]}'"
    tell(f"hint: {reason} is answered greedily; give --temperature to sample")
    return 0.0


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


def report(args: argparse.Namespace, images: list, answer: "Answer", finish_reason: str, more: dict) -> None:
    """Write the masks and the picture; print JSON on stdout, or the faults of the answer on stderr."""
    masks: list[Path | None] = [None] * len(answer.objects)
    if args.masks:
        from .answers.drawing import save_mask

        masks = [save_mask(o, Path(args.masks), n) for n, o in enumerate(answer.objects)]
    if args.json:
        from .answers.record import record

        sizes = [image.size for image in images]
        said = record(args.model, args.prompt, answer, finish_reason, masks if args.masks else (), sizes)
        command.say_json(said | more)
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
    arguments.check(parser, args, "draw", "video")
    if args.frames and not args.video:
        parser.error("--frames goes with --video")
    args.frames = args.frames or FRAMES
    if (count := len(args.image) if args.image else args.frames) > 1 and (args.draw or args.masks):
        parser.error(f"--draw and --masks are for one image, and one prompt is about {count}: leave them out")
    if args.prompt is None:
        parser.error("the following arguments are required: --prompt")
    if args.backend == "reference" and args.device == "cuda":
        parser.error("--backend reference computes on the CPU; leave out --device cuda")
    if args.backend == "reference" and args.quantize:
        parser.error("--backend reference quantises nothing; leave out --quantize, or save the weights first")
    return args


def option_parser() -> command.Parser:
    about = "Answer a prompt about an image with PaliGemma."
    parser = command.Parser(prog="python -m paligemma.generate", description=about)
    add = parser.add_argument
    # fmt: off
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--image", nargs="+", action="extend", metavar="PATH",
        help="path of the image, or - to read it from stdin; several for one prompt about all of them")
    either.add_argument("--video", metavar="PATH", help="path of a video, or -, instead of images; "
        "needs the package av")
    add("--frames", type=at_least(1), metavar="N",
        help=f"how many frames of --video to take, evenly spaced over the whole of it (default: {FRAMES})")
    arguments.prompt_options(add)
    arguments.sampling_options(add)
    arguments.model_options(add, ("auto", "torch", "numba", "triton", "reference"))
    add("--json", action="store_true", help="print one JSON object: text, why it ended, objects with box and "
        "score, token ids, timings")
    add("--draw", metavar="FILE",
        help="write the image with boxes, labels and masks to this .png, .jpg or .webp")
    arguments.answer_options(add)
    # fmt: on
    return parser


if __name__ == "__main__":
    command.process(main)
