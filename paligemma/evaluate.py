"""Scores the answers of `python -m paligemma.batch` beside the truth.

python -m paligemma.evaluate out.jsonl --coco annotations.json
python -m paligemma.evaluate out.jsonl --exact truth.jsonl
"""

import argparse
import json
from typing import Any

from . import command
from .command import say, tell
from .scoring import coco, texts
from .scoring.rows import SCORES, Problems, read_rows


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    problems = Problems()
    report: dict[str, Any] = {"answers": args.answers, "truth": args.coco or args.exact}
    rows = read_rows(args.answers, problems)
    if args.coco:
        if args.to_coco:
            command.check_replaceable(args.to_coco)
        coco.library()  # before the large files are read
        truth = coco.read_annotations(args.coco)
        found = coco.results(rows.values(), truth, problems, score=args.score)
        if args.masks or args.to_coco:
            found = coco.with_masks(found, truth)
        report["coco"] = coco.average_precision(truth, found, masks=args.masks)
        if args.to_coco:
            with command.replacing(args.to_coco) as file:
                file.write(json.dumps(coco.exported(found, truth)).encode())
    else:
        report["texts"] = texts.score(rows, texts.read_truth(args.exact, problems), problems)
    for line in problems.lines():
        tell(line)
    report["problems"] = {kind: len(names) for kind, names in problems.found.items()}
    command.say_json(report) if args.json else say(table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    """The scores in lines of aligned text."""
    if "coco" in report:
        scores = ((name, report["coco"][name]) for name in coco.SUMMARY)
        lines = [f"{name:10} {'-' if value is None else f'{value:.4f}'}" for name, value in scores]
    else:
        lines = [f"{'metric':8} {'ids':>7} {'mean':>7}"]
        for metric, values in report["texts"].items():
            lines.append(f"{metric:8} {values['count']:7} {values['mean']:7.4f}")
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Score the answers of paligemma.batch beside the truth."
    parser = command.Parser(prog="python -m paligemma.evaluate", description=about)
    add, truth = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    # fmt: off
    add("answers", metavar="out.jsonl", help="the output of python -m paligemma.batch")
    truth.add_argument("--coco", metavar="FILE", help="score boxes: annotations in COCO's format")
    truth.add_argument("--exact", metavar="FILE", help="score texts: lines {\"id\", \"answers\"}; with "
        "\"metric\": \"vqa\" or \"anls\" by the rule of VQAv2 or DocVQA instead of an exact match")
    add("--masks", action="store_true", help="score the masks instead of the boxes (with --coco)")
    add("--score", choices=(*SCORES, "none"), default="score",
        help="what ranks the objects (with --coco; default: %(default)s)")
    add("--to-coco", metavar="FILE", help="also write objects and masks as COCO's results (with --coco)")
    add("--json", action="store_true", help="print one JSON object")
    # fmt: on
    args = parser.parse_args(argv)
    for name in ("masks", "to_coco"):
        if getattr(args, name) and not args.coco:
            parser.error(f"--{name.replace('_', '-')} goes with --coco")
    if args.score != "score" and not args.coco:
        parser.error("--score goes with --coco")
    return args


if __name__ == "__main__":
    command.process(main)
