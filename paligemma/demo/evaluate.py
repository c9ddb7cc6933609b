"""Measures the accuracy of the demo model: python -m paligemma.demo.evaluate

It draws new scenes, and asks for a caption, an answer to a question and a detection in each. The model
answers greedily through the public interface."""

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

HELD_OUT = 0  # part of the random seed, where training has the stage: 1, 2 or 3
MOST_TOKENS = 40  # four boxes take 31
BOX = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})> ([^;]*[^; ])")


class Trial(NamedTuple):
    """A prompt with its right answer."""

    picture: Image.Image
    prompt: str
    answer: str
    boxes: list[tuple[str, Box]] | None = None  # label and box of each object to detect


def held_out(count: int, seed: int, *, squeezed: float = 0.0) -> list[scenes.Scene]:
    """Scenes that are not used in training. squeezed: the share of pictures that are not square."""
    generators = (np.random.default_rng([seed, HELD_OUT, i]) for i in range(count))
    return [scenes.random_scene(rng, squeezed=squeezed) for rng in generators]


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
    """The answer of a model of `load_hf_model` to each trial, computed in batches of `batch`."""
    said = []
    for i in tqdm(range(0, len(asked), batch), desc="answering", disable=None, leave=False):
        some = asked[i : i + batch]
        inputs = processor(text=[trial.prompt for trial in some], images=[trial.picture for trial in some])
        rows = model.generate(**inputs, max_new_tokens=MOST_TOKENS)
        said += [processor.tokenizer.decode(row) for row in rows]
    return said


def read_boxes(text: str) -> list[tuple[str, Box]]:
    """Label and box of each complete detection in an answer."""
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
    """For each true box, its overlap with the best remaining box of the same label, which is then taken; 0 if
    none remains."""
    left, result = list(said), []
    for label, box in true:
        same = [one for one in left if one[0] == label]
        best = max(same, key=lambda one: overlap(one[1], box), default=None)
        result.append(overlap(best[1], box) if best else 0.0)
        if best:
            left.remove(best)
    return result


def score(asked: list[Trial], said: list[str]) -> dict[str, float]:
    """The shares of exact captions, of exact answers, and of detections with the right number of boxes; and
    the mean overlap of boxes."""
    exact: dict[str, list[bool]] = {"caption": [], "answer": []}
    counted, found = [], []
    for trial, text in zip(asked, said, strict=True):
        if trial.boxes is None:
            exact[trial.prompt.split()[0]].append(text == trial.answer)
        else:
            boxes = read_boxes(text)
            counted.append(len(boxes) == len(trial.boxes) and text.count("<loc") == 4 * len(boxes))
            found += overlaps(boxes, trial.boxes)
    parts = {"captions": exact["caption"], "questions": exact["answer"]}
    parts |= {"number_of_boxes": counted, "mean_iou": found}
    return {name: round(float(sum(values)) / len(values), 4) for name, values in parts.items() if values}


def evaluate(
    model: str | Path, count: int, seed: int, *, dtype: str = "bfloat16", squeezed: float = 0.0
) -> dict[str, float]:
    """The scores of a checkpoint on `count` new scenes."""
    from .. import load_hf_model

    network, processor = load_hf_model(model, dtype=dtype, device="cpu")
    asked = trials(held_out(count, seed, squeezed=squeezed), seed)
    return score(asked, answers(network, processor, asked))


def main(argv: list[str] | None = None) -> int:
    about = "Score the demo model on scenes that it has not seen."
    parser = command.Parser(prog="python -m paligemma.demo.evaluate", description=about)
    add, dtypes = parser.add_argument, ("float32", "float16", "bfloat16")
    # fmt: off
    add("--model", default=NAME, help="hub id or local directory of a model trained on such scenes (default: "
        "the one that ships with the package)")
    add("--scenes", type=at_least(1), default=200, metavar="N",
        help="number of scenes, three prompts each (default: %(default)s)")
    add("--seed", type=at_least(0), default=1, metavar="N", help="seed of the scenes (default: %(default)s)")
    add("--squeezed", type=float, default=0.0, metavar="SHARE",
        help="share of pictures that are not square (default: %(default)s)")
    add("--dtype", default="bfloat16", choices=dtypes,
        help="dtype of weights and activations (default: %(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if not 0 <= args.squeezed <= 1:
        parser.error(f"--squeezed is {args.squeezed}; it must be 0 to 1")
    torch.set_num_threads(1)  # such small matrix products are slower on two cores than on one
    started = time.perf_counter()
    try:
        scores = evaluate(args.model, args.scenes, args.seed, dtype=args.dtype, squeezed=args.squeezed)
    except PaliGemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(scores))
    seconds = f"{time.perf_counter() - started:.1f} s"
    print(f"{3 * args.scenes} prompts in {seconds}, drawing and loading included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    command.process(main)
