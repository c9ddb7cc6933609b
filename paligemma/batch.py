"""The command line for many pictures: appends an answer for each to a JSONL file, and resumes it.

python -m paligemma.batch --images photos --task caption --out captions.jsonl
"""

import argparse
import hashlib
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from . import arguments, command
from .command import STDERR, at_least, tell
from .questions import Asked, Lines, pictures

if TYPE_CHECKING:
    from .answers.parsing import Answer
    from .pipeline import Pipeline, Question
    from .resumable import Output

LONGEST_NAME = 150  # bytes of the part of a mask's name that comes from the id


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    from .answers.drawing import check_writable

    asked: Iterable[Asked]
    if args.images is not None:
        asked = pictures(args.images, args.prompt, args.task)
    else:
        asked = Lines(args.jsonl, args.prompt, args.task)
    # Mistakes in the file are found before any work is done; stdin can be read only once.
    total = None if args.jsonl == "-" else sum(1 for _ in asked)
    if args.masks:
        check_writable(args.masks, directory=True)
    arguments.choose_model(args)

    from .resumable import Output

    with Output(args.out, args.model) as output:
        done = 0 if total is None else sum(output.answered(a.id, a.prompt) for a in asked)
        if done and done == total:
            tell(f"{args.out} has all {total} answers")
            return 0
        if done:
            tell(f"{args.out} has {done} of {total} answers: the others are computed")
        return answer(args, output, asked, total and total - done)


def answer(args: argparse.Namespace, output: "Output", asked: Iterable[Asked], total: int | None) -> int:
    """Append the answers to all questions that are not answered yet."""
    from tqdm import tqdm

    pipeline, failed, count, started = load(args), 0, 0, time.perf_counter()
    terminal = {"file": STDERR, "disable": not STDERR.isatty(), "unit": " rows", "dynamic_ncols": True}
    with tqdm(total=total, **terminal) as bar:
        for told in pipeline.answers(questions(args, output, asked)):
            output.write(told)
            count, failed = count + 1, failed + ("error" in told)
            bar.update()
    seconds = time.perf_counter() - started
    waited = f"; {pipeline.waited:.1f} s of them waiting for pictures" if pipeline.waited >= 0.05 else ""
    tell(f"{count} rows in {seconds:.1f} s, {count / seconds:.2f} rows/s{waited}")
    if failed:
        command.fail(f"{failed} of {count} rows failed; their lines in {args.out} say why")
    return 1 if failed else 0


def questions(args: argparse.Namespace, output: "Output", asked: Iterable[Asked]) -> Iterator["Question"]:
    """The questions without an answer."""
    from .options import Sampling
    from .pipeline import Question

    hinted = args.temperature is not None
    for id, image, prompt, task in asked:
        if output.answered(id, prompt):
            continue
        greedy = arguments.is_greedy(task, prompt)
        if greedy and not hinted:
            hinted = True
            which = "with a task, and prompts that begin with detect, segment or ocr,"
            tell(f"hint: rows {which} are answered greedily; give --temperature to sample")
        default = 0.0 if greedy else arguments.TEMPERATURE
        temperature = default if args.temperature is None else args.temperature
        yield Question(id, image, prompt, Sampling(temperature, args.top_p, args.seed))


def load(args: argparse.Namespace) -> "Pipeline":
    from .answers.masks import MaskDecoder
    from .engines import load_model
    from .pipeline import Pipeline, choose_slots

    masked = args.masks or args.mask_decoder
    local = {"local_files_only": args.local_files_only}
    decoder = MaskDecoder.load(args.mask_decoder, **local) if masked else None
    model, processor = load_model(args)
    slots = args.batch_size
    if slots is None:
        slots = choose_slots(model, args.max_new_tokens)
        tell(f"--batch-size {slots}: as many rows as the free memory of the {model.device.type} has room for")
    return Pipeline(
        model, processor, slots, name=args.model, max_new_tokens=args.max_new_tokens, bins=args.bins,
        log_probs=args.log_probs, mask_decoder=decoder,
        save_masks=(lambda id, answer: save_masks(Path(args.masks), id, answer)) if args.masks else None,
    )  # fmt: skip


def save_masks(directory: Path, id: str | int, answer: "Answer") -> list[Path | None]:
    """Write the masks of an answer, in files whose names begin with the id. Whatever the id is, the files are
    in the directory."""
    from .answers.drawing import save_mask

    name = quote(str(id), safe=" ", errors="surrogatepass")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return [save_mask(o, directory, n, f"{name}-") for n, o in enumerate(answer.objects)]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    arguments.check(parser, args, "images", "jsonl", "out")
    if args.images is not None and args.prompt is None:
        parser.error("--images needs --prompt or --task")
    return args


def option_parser() -> command.Parser:
    about = "Answer prompts about many images with PaliGemma. Run again, it resumes the output."
    parser = command.Parser(prog="python -m paligemma.batch", description=about)
    source = parser.add_mutually_exclusive_group(required=True)
    add = parser.add_argument
    # fmt: off
    source.add_argument("--images", metavar="DIR|GLOB", help="directory of images, or a pattern in quotes, "
        "such as 'photos/**/*.jpg'")
    source.add_argument("--jsonl", metavar="FILE", help="a line for each image, such as "
        """{"id": 1, "image": "a.jpg", "prompt": "caption en"}, with task and lang if wanted; paths are """
        "relative to the file; - reads stdin")
    add("--out", required=True, metavar="FILE", help="JSONL file for the answers, which is appended to")
    add("--batch-size", type=at_least(1), metavar="N",
        help="images that are answered together (default: 16, or fewer if the free memory is small)")
    add("--log-probs", action="store_true", help="write the ids and log-probabilities of the tokens too")
    arguments.prompt_options(add, "for the lines that have none of their own")
    arguments.sampling_options(add)
    arguments.model_options(add, ("auto", "torch", "numba", "triton"))
    arguments.answer_options(add)
    # fmt: on
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, command.interrupted)  # what is written stays, as with Ctrl-C
    command.process(main)
