"""How well the demo model knows its world: python -m paligemma.demo.evaluate

Fresh scenes, three prompts to each (a caption, a question, a detection), answered greedily through the public
interface."""

import json
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import command
from ..command import at_least
from ..errors import PaliGemmaError
from . import NAME, scenes, texts
from .scenes import Box

HELD_OUT = 0  # in the place where the training's seeds have their stage
MOST_TOKENS = 40  # four boxes are 31
BOX = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ([^;]*[^; ])")


class Trial(NamedTuple):
    """A prompt with its right answer, which for a detection is boxes."""

    picture: Image.Image
    prompt: str
    answer: str
    boxes: list[tuple[str, Box]] | None = None


def held_out(count: int, seed: int, *, squeezed: float = 0.0) -> list[scenes.Scene]:
    """Scenes that no training has seen."""
    return [
        scenes.random_scene(np.random.default_rng([seed, HELD_OUT, i]), squeezed=squeezed)
        for i in range(count)
    ]


def trials(drawn: list[scenes.Scene], seed: int) -> list[Trial]:
    """A caption, a question and a detection for each scene."""
    made, rng = [], np.random.default_rng([seed, HELD_OUT])
    for picture, shapes in ((scene.picture, scene.shapes) for scene in drawn):
        question, answer = texts.random_question(rng, shapes)
        queries = texts.random_query(rng, shapes)
        boxes = texts.detect(queries, shapes)
        made.append(Trial(picture, "caption en", texts.caption(shapes)))
        made.append(Trial(picture, f"answer en {question}", answer))
        made.append(Trial(picture, f"detect {' ; '.join(queries)}", texts.boxes_text(boxes), boxes))
    return made


def answers(model, processor, asked: list[Trial], batch: int = 30) -> list[str]:
    """What a model of `load_hf_model` says to each, `batch` at a time."""
    said = []
    for i in tqdm(range(0, len(asked), batch), desc="answering", disable=None, leave=False):
        some = asked[i : i + batch]
        inputs = processor(text=[trial.prompt for trial in some], images=[trial.picture for trial in some])
        said += [
            processor.tokenizer.decode(row) for row in model.generate(**inputs, max_new_tokens=MOST_TOKENS)
        ]
    return said


def read_boxes(text: str) -> list[tuple[str, Box]]:
    """Label and box of each detection in an answer; what is not whole is left out."""
    found = []
    for *corners, label in BOX.findall(text):
        y0, x0, y1, x1 = (int(corner) / 1024 for corner in corners)
        found.append((label, (y0, x0, y1, x1)))
    return found


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(height, 0) * max(width, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def overlaps(said: list[tuple[str, Box]], true: list[tuple[str, Box]]) -> list[float]:
    """For each true box its overlap with the best of that label that no earlier one took; 0 for one that was
    missed."""
    left, result = list(said), []
    for label, box in true:
        best = max(
            (one for one in left if one[0] == label), key=lambda one: overlap(one[1], box), default=None
        )
        result.append(overlap(best[1], box) if best else 0.0)
        if best:
            left.remove(best)
    return result


def score(asked: list[Trial], said: list[str]) -> dict[str, float]:
    """Shares of exact captions, of exact answers, of detections with the right number of boxes; mean overlap
    of their boxes."""
    exact: dict[str, list[bool]] = {"caption": [], "answer": []}
    counted, found = [], []
    for trial, text in zip(asked, said, strict=True):
        if trial.boxes is None:
            exact[trial.prompt.split()[0]].append(text == trial.answer)
        else:
            boxes = read_boxes(text)
            counted.append(len(boxes) == len(trial.boxes) and text.count("<loc") == 4 * len(boxes))
            found += overlaps(boxes, trial.boxes)
    parts = {
        "captions": exact["caption"],
        "questions": exact["answer"],
        "number_of_boxes": counted,
        "mean_iou": found,
    }
    return {name: round(float(sum(values)) / len(values), 4) for name, values in parts.items() if values}


def evaluate(
    model: str | Path, count: int, seed: int, *, dtype: str = "bfloat16", squeezed: float = 0.0
) -> dict[str, float]:
    """The scores of a checkpoint on `count` fresh scenes."""
    from .. import load_hf_model

    network, processor = load_hf_model(model, dtype=dtype, device="cpu")
    asked = trials(held_out(count, seed, squeezed=squeezed), seed)
    return score(asked, answers(network, processor, asked))


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser(
        prog="python -m paligemma.demo.evaluate",
        description="Score the demo model on scenes that it has not seen.",
    )
    parser.add_argument(
        "--model",
        default=NAME,
        help="hub id or local directory of one trained in this world (default: the one that ships)",
    )
    parser.add_argument(
        "--scenes",
        type=at_least(1),
        default=200,
        metavar="N",
        help="three prompts each (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=1, metavar="N", help="of the scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--squeezed",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of pictures that are not square (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("float32", "float16", "bfloat16"),
        help="of weights and activations (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.squeezed <= 1:
        parser.error(f"--squeezed is {args.squeezed}; it must be 0 to 1")
    torch.set_num_threads(1)  # products this small are slower on two cores than on one
    started = time.perf_counter()
    try:
        scores = evaluate(args.model, args.scenes, args.seed, dtype=args.dtype, squeezed=args.squeezed)
    except PaliGemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(scores))
    print(
        f"{3 * args.scenes} prompts in {time.perf_counter() - started:.1f} s, drawing and loading included",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    command.process(main)
