"""Compares definitions of the score of an object, by COCO's average precision of the demo model.

    python -m benchmarks.box_scores

The demo detects in scenes that it was not trained on, and in crowds: pictures of four such scenes, with up to
16 shapes at half their size, which it was not trained for. Each prompt is an image in COCO's sense, and many
prompts name a shape that is absent. The command writes benchmarks/results/box_scores-DATE.json and
prints a table: the average precision (AP), the AP at IoU 0.5, and for right and wrong boxes the median of the
score and the shares above thresholds. COCO's matching at IoU 0.5 says which boxes are right."""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from paligemma import load_hf_model
from paligemma.demo import texts
from paligemma.demo.evaluate import held_out
from paligemma.demo.scenes import Scene, Shape
from paligemma.scoring.coco import Annotations, average_precision, library
from paligemma.scoring.rows import Found

from .whole_model import commit, device_name, versions

Score = Callable[[float, float], float]  # of box_score and label_score
SCORES: dict[str, Score] = {
    "none": lambda box, label: 1.0,
    "label": lambda box, label: label,
    "box": lambda box, label: box,
    "label * box": lambda box, label: label * box,
    "(label * box) ** (1/2)": lambda box, label: (label * box) ** 0.5,
    "(label * box ** 4) ** (1/5)": lambda box, label: (label * box**4) ** 0.2,
    "label * box ** (1/2)": lambda box, label: label * box**0.5,
    "label * box ** (1/4)": lambda box, label: label * box**0.25,
    "label * box ** (1/10)": lambda box, label: label * box**0.1,
}
THRESHOLDS, OVERLAP = (0.3, 0.4), 0.5
PROMPTS, BATCH, TOKENS = 3, 30, 140  # prompts for each scene; 16 boxes take 127 tokens


def main() -> None:
    about = "Compare definitions of the score of an object."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.box_scores", description=about)
    parser.add_argument("--scenes", type=int, default=400, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="seed of the scenes (default: %(default)s)")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=folder, help="directory of the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenes = held_out(4 * args.scenes, args.seed)
    crowds = [crowd(scenes[4 * i : 4 * i + 4]) for i in range(args.scenes)]
    results = {
        "command": f"python -m benchmarks.box_scores --scenes {args.scenes} --seed {args.seed}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name("cpu"), "versions": versions(),
        "scenes": compared(scenes[: args.scenes], args.seed), "crowds": compared(crowds, args.seed),
    }  # fmt: skip
    args.results.mkdir(exist_ok=True)
    path = args.results / f"box_scores-{date.today().isoformat()}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    for kind in ("scenes", "crowds"):
        print(f"{kind}: {results[kind]['true']} objects, {results[kind]['found']} found")
        for name, row in results[kind]["scores"].items():
            print(f"  {name:28}", *(f"{key} {value}" for key, value in row.items()), sep="  ")
    print(f"wrote {path}")


def crowd(four: list[Scene], side: int = 448) -> Scene:
    """Four scenes in one picture, each in a quarter of it."""
    picture, shapes, half = Image.new("RGB", (side, side)), [], side // 2
    for n, scene in enumerate(four):
        down, across = divmod(n, 2)
        small = scene.picture.resize((half, half), Image.Resampling.LANCZOS)
        picture.paste(small, (across * half, down * half))
        for shape in scene.shapes:
            y0, x0, y1, x1 = shape.box
            box = ((down + y0) / 2, (across + x0) / 2, (down + y1) / 2, (across + x1) / 2)
            shapes.append(Shape(shape.colour, shape.kind, box))
    return Scene(picture, tuple(sorted(shapes, key=lambda shape: shape.centre[1])))


def compared(scenes: list[Scene], seed: int) -> dict:
    """The numbers of true and of found objects, and what each of SCORES reaches."""
    rng = np.random.default_rng(seed)
    asked = [(s, texts.random_query(rng, s.shapes, tricky=True)) for s in scenes for _ in range(PROMPTS)]
    truth = annotations([(scene.picture, queries, scene.shapes) for scene, queries in asked])
    found = [(n, o) for n, objects in enumerate(detected(asked), 1) for o in objects]
    known = [(n, truth.category(o.label), o) for n, o in found]
    report = {"prompts": len(asked), "true": len(truth.objects), "found": len(found), "scores": {}}
    for name, score in SCORES.items():
        results = [
            {
                "image_id": n, "category_id": category, "score": score(o.scores["box"], o.scores["label"]),
                "bbox": [*o.box[:2], o.box[2] - o.box[0], o.box[3] - o.box[1]],
            }
            for n, category, o in known if category
        ]  # fmt: skip
        summary, right = average_precision(truth, results), are_right(truth, results)
        values, row = (
            np.array([one["score"] for one in results]),
            {"AP": summary["AP"], "AP50": summary["AP50"]},
        )
        for kind, some in (("right", values[right]), ("wrong", values[~right])):
            if some.size:
                row[f"{kind}_median"] = round(float(np.median(some)), 4)
                row |= {f"{kind}_above_{t}": round(float((some >= t).mean()), 4) for t in THRESHOLDS}
        report["scores"][name] = row
    return report


def detected(asked: list[tuple[Scene, list[str]]]) -> list[list[Found]]:
    """The objects in the answer to each prompt."""
    model, processor = load_hf_model("demo", dtype="float32", device="cpu")
    answers = []
    for i in tqdm(range(0, len(asked), BATCH), disable=None):
        some, log_probs = asked[i : i + BATCH], []
        prompts = [f"detect {' ; '.join(queries)}" for _, queries in some]
        inputs = processor(text=prompts, images=[scene.picture for scene, _ in some])
        ids = model.generate(**inputs, max_new_tokens=TOKENS, log_probs=log_probs)
        columns = torch.stack(log_probs, dim=1)
        for row, column, (scene, _) in zip(ids, columns, some, strict=True):
            objects = processor.parse(row, scene.picture.size, column).objects
            scores = [{"box": o.box_score or 0.0, "label": o.label_score or 0.0} for o in objects]
            answers.append([Found(o.label, o.box, s, None) for o, s in zip(objects, scores, strict=True)])
    return answers


def annotations(asked: list[tuple[Image.Image, list[str], tuple[Shape, ...]]]) -> Annotations:
    """The truth: an image for each prompt, and a category for each name in the prompts."""
    names = sorted({query for _, queries, _ in asked for query in queries})
    images, objects = [], []
    for n, (picture, queries, shapes) in enumerate(asked):
        width, height = picture.size
        images.append({"id": n, "width": width, "height": height, "file_name": ""})
        for label, (y0, x0, y1, x1) in texts.detect(queries, shapes):
            box = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            objects.append({"image_id": n, "category_id": names.index(label), "bbox": box})
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    return Annotations({"images": images, "categories": categories, "annotations": objects})


def are_right(truth: Annotations, results: list[dict]) -> np.ndarray:  # (N,) bool
    """Which results COCO matches with a true object."""
    tools, silent = library(), {"print_function": lambda *_: None}
    dataset = tools.COCO(truth.dataset(), **silent)
    found = dataset.loadRes([dict(one) for one in results])
    judge = tools.COCOeval_faster(dataset, found, "bbox", extra_calc=True, **silent)
    judge.params.iouThrs = np.array([OVERLAP])
    judge.evaluate()
    judge.accumulate()
    return np.array([bool(found.anns[n].get("tp")) for n in range(1, len(results) + 1)])


if __name__ == "__main__":
    main()
