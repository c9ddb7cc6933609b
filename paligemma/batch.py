"""The command line for many pictures: appends an answer for each to a JSONL file, and resumes it.

python -m paligemma.batch --images photos --task caption --out captions.jsonl
"""

import argparse
import os
import signal
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from . import arguments, command
from .command import STDERR, at_least, tell
from .errors import PaliGemmaError
from .questions import Asked, Lines, pictures

if TYPE_CHECKING:
    from .pipeline import Pipeline, Question
    from .resumable import Output


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    from .answers.drawing import check_writable

    asked: Iterable[Asked]
    if args.images is not None:
        asked = pictures(args.images, args.prompt, args.task)
    else:
        asked = Lines(args.jsonl, args.prompt, args.task)
    # Mistakes in the file are found before any work is done; stdin and pipes can be read only once.
    total = None if isinstance(asked, Lines) and asked.stream else sum(1 for _ in asked)
    if args.ray:
        from . import cluster

        cluster.check_installed()
    if args.masks:
        check_writable(args.masks, directory=True)
        if args.images is not None and os.path.realpath(args.images) == os.path.realpath(args.masks):
            raise PaliGemmaError(f"--masks {args.masks} is the directory of the images: give another one")
    adapter = args.adapter
    arguments.choose_model(args)
    args.name = arguments.model_name(args, adapter)

    from .resumable import Output

    with Output(args.out, args.name) as output:
        done = 0 if total is None else sum(output.answered(a.id, a.prompt, a.image) for a in asked)
        if done == total:
            tell(f"{args.out} has all {total} answers")
            return 0
        if done:
            tell(f"{args.out} has {done} of {total} answers: the others are computed")
        return answer(args, output, asked, total and total - done)


def answer(args: argparse.Namespace, output: "Output", asked: Iterable[Asked], total: int | None) -> int:
    """Append the answers to all questions that are not answered yet."""
    from tqdm import tqdm

    pipeline, failed, count = None if args.ray else load(args), 0, 0
    started, todo = time.perf_counter(), questions(args, output, asked)
    if pipeline:
        records = pipeline.answers(todo)
    else:
        from . import cluster

        records = cluster.answers(args, options(args), list(todo))
    terminal = {"file": STDERR, "disable": not STDERR.isatty(), "unit": " rows", "dynamic_ncols": True}
    with tqdm(total=total, **terminal) as bar:
        for told in records:
            output.write(told)
            count, failed = count + 1, failed + ("error" in told)
            bar.update()
    seconds = time.perf_counter() - started
    waiting = pipeline.waited if pipeline else 0
    waited = f"; {waiting:.1f} s of them waiting for pictures" if waiting >= 0.05 else ""
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
        if output.answered(id, prompt, image):
            continue
        greedy = arguments.is_greedy(task, prompt)
        if greedy and not hinted:
            hinted = True
            which = "with a task, and prompts that begin with detect, segment or ocr,"
            tell(f"hint: rows {which} are answered greedily; give --temperature to sample")
        temperature = arguments.temperature_of(task, prompt, args.temperature)
        yield Question(id, image, prompt, Sampling(temperature, args.top_p, args.seed))


def load(args: argparse.Namespace) -> "Pipeline":
    from .pipeline import load_pipeline

    pipeline = load_pipeline(args.model, args.batch_size, **options(args))
    if args.batch_size is None:
        slots, where = pipeline.rows.slots, pipeline.rows.model.device.type
        tell(f"--batch-size {slots}: as many rows as the free memory of the {where} has room for")
    return pipeline


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line that `load_pipeline` takes."""
    same = ("max_new_tokens", "bins", "log_probs", "masks", "mask_decoder", "device", "revision", "backend")
    more = ("local_files_only", "tokenizer", "adapter", "quantize", "full_attention", "name")
    return {name: getattr(args, name) for name in (*same, *more)} | {"dtype": args.dtype or "auto"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    arguments.check(parser, args, "images", "jsonl", "out", "ray")
    if args.images is not None and args.prompt is None:
        parser.error("--images needs --prompt or --task")
    if args.ray_workers and not args.ray:
        parser.error("--ray-workers goes with --ray")
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
    add("--ray", metavar="ADDRESS", help="compute on a Ray cluster: its address, auto for the one of this "
        "machine, or local to start one here")
    add("--ray-workers", type=at_least(1), metavar="N",
        help="copies of the model on the cluster (default: one for each GPU; without GPUs, for each machine)")
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
