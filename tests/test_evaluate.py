"""Scores on a data set: equal to independent implementations, and each fault of the inputs is said."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, environment
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from supervision import Detections

from paligemma import evaluate, generate
from paligemma.demo.evaluate import held_out
from paligemma.scoring import coco, detections, texts, vqa

SIZE = 200, 100  # width, height of the images of `drawn`
NAMES = ["cat", "traffic light", "dog"]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def row(name, objects=(), text="", **more) -> dict:
    size = dict(zip(("width", "height"), SIZE, strict=True))
    return {
        "id": name,
        "model": "m",
        "image": size,
        "prompt": "p",
        "text": text,
        "objects": list(objects),
        **more,
    }


def found(label: str, box, score=0.9, **more) -> dict:
    scores = {"score": score, "box_score": 0.1, "label_score": 0.9}
    return {"label": label, "box": list(box), **scores, **more}


def drawn(seed: int = 0, images: int = 30) -> tuple[dict, list[dict]]:
    """Annotations with crowds and sparse ids, and rows: true boxes that are moved or left out or mislabelled,
    and others."""
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.permutation(1000)[:images]]
    categories = [{"id": n, "name": name} for n, name in zip((3, 90, 7), NAMES, strict=True)]
    pictures = [{"id": i, "width": SIZE[0], "height": SIZE[1], "file_name": f"{i:06}.jpg"} for i in ids]
    annotations, rows = [], []
    for i in ids:
        said = []
        for _ in range(rng.integers(0, 9)):
            x, y, w, h = (float(v) for v in rng.uniform((0, 0, 5, 5), (100, 50, 100, 50)))
            n = int(rng.integers(3))
            true = {"id": 10 * len(annotations) + 5, "image_id": i, "category_id": categories[n]["id"]}
            crowd = int(rng.random() < 0.1)
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                true
                | {"bbox": [x, y, w, h], "area": 0.7 * w * h, "iscrowd": crowd, "segmentation": segmentation}
            )
            if rng.random() < 0.8:
                moved = np.array([x, y, x + w, y + h]) + rng.normal(0, 3, 4)
                label = NAMES[int(rng.integers(3))] if rng.random() < 0.2 else NAMES[n]
                box = [*moved[:2], max(moved[2], moved[0] + 1), max(moved[3], moved[1] + 1)]
                said.append(found(label, map(float, box), float(rng.random())))
        rows.append(row(f"{i:06}.jpg", said))
    return {"images": pictures, "categories": categories, "annotations": annotations}, rows


def independent(annotations: dict, results: list[dict], kind: str = "bbox") -> list[float]:
    """COCO's summary by pycocotools."""
    truth = COCO()
    truth.dataset = copy.deepcopy({"info": {}, **annotations})
    for one in truth.dataset["annotations"]:
        one.setdefault("iscrowd", 0)
        one.setdefault("area", one["bbox"][2] * one["bbox"][3])
    truth.createIndex()
    judge = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return judge.stats.tolist()


@pytest.fixture
def scored(tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path; returns the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = evaluate.main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path) -> dict:
    """The annotations and the rows of `drawn`, and their files."""
    annotations, rows = drawn()
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    return {"annotations": annotations, "rows": rows, "out": write(tmp_path / "out.jsonl", rows)}


COCO_ARGS = ("out.jsonl", "--coco", "annotations.json")

# Boxes


@pytest.mark.parametrize("seed", range(3))
def test_the_summary_is_that_of_pycocotools(scored, tmp_path, seed):
    annotations, rows = drawn(seed)
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    write(tmp_path / "out.jsonl", rows)
    code, out, err = scored(*COCO_ARGS, "--json", "--to-coco", "results.json")
    assert (code, err) == (0, "")
    report = json.loads(out)["coco"]
    results = json.loads((tmp_path / "results.json").read_text())
    by_file = {one["file_name"]: one["id"] for one in annotations["images"]}
    by_label = {one["name"]: one["id"] for one in annotations["categories"]}
    assert [(one["image_id"], one["category_id"], one["score"]) for one in results] == [
        (by_file[line["id"]], by_label[o["label"]], o["score"]) for line in rows for o in line["objects"]
    ]
    theirs = independent(annotations, results)
    assert [report[name] or 0 for name in coco.SUMMARY] == pytest.approx(
        [max(v, 0) for v in theirs], abs=6e-5
    )
    assert 0.1 < report["AP"] < 0.9
    assert list(report["AP_of_category"]) == NAMES
    assert np.mean(list(report["AP_of_category"].values())) == pytest.approx(report["AP"], abs=1e-4)
    worse = [{**one, "score": 1 - one["score"]} for one in results]  # a mistake changes the summary
    assert abs(independent(annotations, worse)[0] - report["AP"]) > 1e-3


def test_the_score_that_ranks(scored, files, tmp_path):
    for line in files["rows"]:
        for o in line["objects"]:
            o |= {"label_score": o["score"], "score": 1 - o["score"], "box_score": 0.5}
    write(tmp_path / "out.jsonl", files["rows"])
    ap = {}
    for name in ("score", "box_score", "label_score", "none"):
        code, out, _ = scored(*COCO_ARGS, "--json", "--score", name)
        ap[name] = json.loads(out)["coco"]["AP"]
    assert code == 0
    assert ap["box_score"] == ap["none"]
    assert len(set(ap.values())) == 3


def test_the_demo_from_its_command_line_to_its_summary(scored, tmp_path, capsys):
    """Detections of the demo in scenes with known boxes, in the JSON of paligemma.generate."""
    scenes = [scene for scene in held_out(12, 31) if scene.shapes]
    images, annotations, rows = [], [], []
    kinds = sorted({shape.kind for scene in scenes for shape in scene.shapes})
    for n, scene in enumerate(scenes):
        width, height = scene.picture.size
        images.append({"id": n, "width": width, "height": height, "file_name": f"{n}.png"})
        for shape in scene.shapes:
            y0, x0, y1, x1 = np.array(shape.box) * (height, width, height, width)
            annotations.append(
                {"image_id": n, "category_id": kinds.index(shape.kind), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            )
        scene.picture.save(tmp_path / f"{n}.png")
        for kind in {shape.kind for shape in scene.shapes}:  # several rows are about one image
            args = ["--model", "demo", "--image", tmp_path / f"{n}.png", "--prompt", f"detect {kind}"]
            assert generate.main([*map(str, args), "--no-sample", "--json"]) == 0
            line = json.loads(capsys.readouterr().out)
            assert all(o["score"] > 0.3 for o in line["objects"])
            rows.append({**line, "id": f"{n} {kind}", "image_id": n})
    categories = [{"id": n, "name": kind} for n, kind in enumerate(kinds)]
    truth = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    write(tmp_path / "out.jsonl", rows)
    code, out, err = scored(*COCO_ARGS)
    assert (code, err) == (0, "")
    name, value = out.splitlines()[0].split()
    assert name == "AP"
    assert float(value) > 0.8


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("000139.jpg", "000139.jpg"), ("val/000139.jpg", "000139.jpg"), ("000139", "000139.jpg"),
        (139, "000139.jpg"), ("139", "000139.jpg"), ("000139.png", "000139.jpg"),
        ("000139.jpg", "val/000139.jpg"), ("val/000139.jpg", "val/000139.jpg"),
    ],
)  # fmt: skip
def test_images_are_found_by_file_or_id(name, file, tmp_path):
    truth = coco.Annotations(
        {
            "images": [{"id": 7, "width": 9, "height": 9, "file_name": "000007.jpg"},
                       {"id": 139, "width": 9, "height": 9, "file_name": file}],
            "categories": [{"id": 1, "name": "cat"}],
            "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        }
    )  # fmt: skip
    (one,) = evaluate.read_rows(write(tmp_path / "x", [row(name)]), evaluate.Problems()).values()
    assert truth.image(one) == 2


def test_an_ambiguous_file_is_not_guessed(tmp_path):
    images = [{"id": n, "width": 9, "height": 9, "file_name": f"{f}/a.jpg"} for n, f in enumerate("xy")]
    truth = coco.Annotations({"images": images, "categories": [], "annotations": []})
    rows = evaluate.read_rows(write(tmp_path / "x", [row("a.jpg"), row("y/a.jpg")]), evaluate.Problems())
    assert [truth.image(one) for one in rows.values()] == [None, 2]


def test_every_problem_of_boxes_is_counted(scored, files, tmp_path):
    rows, names = files["rows"], [line["id"] for line in files["rows"]]
    _, perfect, _ = scored(*COCO_ARGS, "--json")
    double = [{**rows[3], "objects": []}, *rows]  # the last counts
    changed = {
        "rows with an error, which count as wrong": [{"id": names[0], "error": "corrupt"}, *rows[1:]],
        "ids that occur again, of which the last row counts": double,
        "rows whose image is not annotated, which are left out": [*rows, row("nowhere.jpg")],
        "annotated images without a row, whose objects count as not found": rows[1:],
        "objects whose label is not a category, which are left out": [
            {**rows[0], "objects": [*rows[0]["objects"], found("unicorn", (1, 2, 30, 40), 1.0)]}, *rows[1:]
        ],
        "objects without a score, which get 1": [
            *rows[1:], {**rows[0], "objects": [{"label": "cat", "box": [1, 2, 30, 40]}]}
        ],
        "images of another size than annotated, whose boxes are scaled": [
            {**rows[0], "image": {"width": 400, "height": 300},
             "objects": [{**o, "box": [v * f for v, f in zip(o["box"], (2, 3, 2, 3), strict=True)]}
                         for o in rows[0]["objects"]]}, *rows[1:]
        ],
    }  # fmt: skip
    same = [
        name
        for name in changed
        if "again" in name or "nowhere" in name or "left out" in name or "scaled" in name
    ]
    for name, lines in changed.items():
        write(tmp_path / "out.jsonl", lines)
        code, out, err = scored(*COCO_ARGS, "--json")
        assert code == 0
        assert err.count("\n") == 1, err
        assert err.startswith(f"{name}: 1 (the first: ")
        report = json.loads(out)
        assert report["problems"] == {name: 1}
        if name in same:
            assert report["coco"] == json.loads(perfect)["coco"], name


def test_labels_are_matched_without_case(scored, files, tmp_path):
    _, before, _ = scored(*COCO_ARGS)
    for line in files["rows"]:
        line["objects"] = [{**o, "label": o["label"].title().replace(" ", "_")} for o in line["objects"]]
    write(tmp_path / "out.jsonl", files["rows"])
    assert scored(*COCO_ARGS) == (0, before, "")


def test_nothing_found_scores_zero(scored, files, tmp_path):
    write(tmp_path / "out.jsonl", [{**line, "objects": []} for line in files["rows"]])
    code, out, err = scored(*COCO_ARGS, "--to-coco", "results.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["AP", "0.0000"]
    assert json.loads((tmp_path / "results.json").read_text()) == []


# Masks


def with_mask_files(rows: list[dict], folder: Path) -> list[dict]:
    """The rows, with a file of a mask for each object: a part of its box."""
    folder.mkdir()
    masked = []
    for line in rows:
        objects = []
        for n, o in enumerate(line["objects"]):
            mask = np.zeros(SIZE[::-1], np.uint8)
            x0, y0, x1, y1 = (max(round(v), 0) for v in o["box"])
            mask[y0:y1, x0 : x1 - (x1 - x0) * (n % 4) // 5] = 255
            name = f"{folder.name}/{line['id']}-{n}.png"
            Image.fromarray(mask).save(folder.parent / name)
            objects.append({**o, "mask": name})
        masked.append({**line, "objects": objects})
    return masked


def test_masks_are_those_of_pycocotools(scored, files, tmp_path):
    rows = with_mask_files(files["rows"], tmp_path / "masks")
    write(tmp_path / "out.jsonl", rows)
    code, out, err = scored(*COCO_ARGS, "--masks", "--json", "--to-coco", "results.json")
    assert (code, err) == (0, "")
    report, results = json.loads(out)["coco"], json.loads((tmp_path / "results.json").read_text())
    paths = [o["mask"] for line in rows for o in line["objects"]]
    for one, path in zip(results, paths, strict=True):
        decoded = coco_mask.decode(one["segmentation"])
        assert np.array_equal(decoded > 0, np.asarray(Image.open(tmp_path / path)) > 0)
    theirs = independent(
        files["annotations"], [{k: v for k, v in one.items() if k != "bbox"} for one in results], "segm"
    )
    assert [report[name] or 0 for name in coco.SUMMARY] == pytest.approx(
        [max(v, 0) for v in theirs], abs=6e-5
    )
    boxes = json.loads(scored(*COCO_ARGS, "--json")[1])["coco"]
    assert report["AP"] != boxes["AP"]


def test_masks_lie_beside_the_answers(scored, files, tmp_path, monkeypatch):
    write(tmp_path / "out.jsonl", with_mask_files(files["rows"], tmp_path / "masks"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = scored("../out.jsonl", "--coco", "../annotations.json", "--masks")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(("size", "message"), [(None, "cannot be read"), ((9, 9), "has 9 x 9 pixels")])
def test_a_mask_that_cannot_be_used(scored, files, tmp_path, size, message):
    rows = with_mask_files(files["rows"], tmp_path / "masks")
    write(tmp_path / "out.jsonl", rows)
    path = next(tmp_path.glob("masks/*.png"))
    path.unlink() if size is None else Image.new("L", size).save(path)
    code, out, err = scored(*COCO_ARGS, "--to-coco", "results.json")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert path.name in err
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, None]],
        "x",
        {"counts": "x", "size": [1, 1]},
        {"size": [100, 200]},
    ],
)
def test_annotations_without_usable_masks(scored, files, tmp_path, segmentation):
    files["annotations"]["annotations"][3]["segmentation"] = segmentation
    (tmp_path / "annotations.json").write_text(json.dumps(files["annotations"]))
    assert scored(*COCO_ARGS)[0] == 0
    code, out, err = scored(*COCO_ARGS, "--masks")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "annotation 4: segmentation is " in err


# Texts


def test_three_metrics_in_one_table(scored, tmp_path):
    people = ["two"] * 3 + ["2"] * 2 + ["three"] * 5
    truth = [
        {"id": 1, "answers": ["a red circle"]}, {"id": 2, "answer": "two"},
        {"id": 3, "answers": people, "metric": "vqa"},
        {"id": "d", "answers": ["Invoice 12", "12"], "metric": "anls"},
        {"id": "gone", "answers": ["x"], "metric": "anls"},
    ]  # fmt: skip
    rows = [
        row("1", text="a red circle\n"),
        row(2, text="Two"),
        row(3, text="2."),
        row("d", text="invoice 13"),
    ]
    write(tmp_path / "truth.jsonl", truth)
    write(tmp_path / "out.jsonl", rows)
    code, out, err = scored("out.jsonl", "--exact", "truth.jsonl", "--json")
    assert (code, err) == (0, "ids of the truth without a row, which count as wrong: 1 (the first: 'gone')\n")
    assert json.loads(out)["texts"] == {
        "exact": {"count": 2, "mean": 0.5}, "vqa": {"count": 1, "mean": 1.0},
        "anls": {"count": 2, "mean": pytest.approx(0.45)},
    }  # fmt: skip
    code, out, _ = scored("out.jsonl", "--exact", "truth.jsonl")
    assert [line.split() for line in out.splitlines()] == [
        ["metric", "ids", "mean"], ["exact", "2", "0.5000"], ["vqa", "1", "1.0000"], ["anls", "2", "0.4500"],
    ]  # fmt: skip


def test_every_problem_of_texts_is_counted(scored, tmp_path):
    write(tmp_path / "truth.jsonl", [{"id": n, "answers": ["yes"]} for n in range(4)])
    lines = [row(0, text="no"), row(0, text="yes"), {"id": 1, "error": "corrupt"}, row(2, text="yes"), row(9)]
    path = write(tmp_path / "out.jsonl", lines)
    path.write_text(path.read_text() + '{"id": 3, "text": "ye')
    code, out, err = scored("out.jsonl", "--exact", "truth.jsonl", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["texts"] == {"exact": {"count": 4, "mean": 0.5}}
    assert set(report["problems"].values()) == {1}
    assert [line.partition(" ")[0] for line in err.splitlines()] == [
        "ids",
        "unfinished",
        "rows",
        "ids",
        "rows",
    ]
    assert len(report["problems"]) == 5


# What the official code gives for these (GT-Vision-Lab/VQA, a013f00): processPunctuation, processDigitArticle
NORMALISED = {
    "The Dog": "dog", "a  cat": "cat", "Two.": "2", "none": "0", "dont know": "don't know",
    "Im here": "im here", "couldntve": "couldntve", "couldn'tve": "couldn't've", "somebody'd": "somebodyd",
    "yall'd've": "y'all'd've", "red/blue": "red blue", "red / blue": "red blue",
    "t-shirt": "t shirt", "t -shirt": "t shirt", "x - ray": "x ray", "1,000": "1000",
    "1,000 t-shirts": "1000 tshirts",
    "3.5": "3.5", ".5": ".5", "u.s.": "us", "10:30": "10:30", "what?!": "what", "(yes) ": "yes",
    "it's": "it's",
    "an apple, the tree": "apple tree", "ten": "10", "eleven": "eleven", "'ow'sat": "'ow's'at",
    "o'clock": "o'clock",
}  # fmt: skip


@pytest.mark.parametrize("text", NORMALISED)
def test_texts_are_normalised_as_by_the_official_code(text):
    assert vqa.normalised(text) == NORMALISED[text]


@pytest.mark.parametrize(
    ("text", "answers", "accuracy"),
    [
        ("yes", ["yes"] * 10, 1), ("Yes", ["yes"] * 10, 0),  # nothing is normalised if all people agree
        ("Yes.", ["yes"] * 9 + ["no"], 1), ("no", ["yes"] * 9 + ["no"], 0.3),
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6), ("no", ["yes"] * 7 + ["no"] * 3, 0.9),
        ("2", ["two", "2", "Two."] + ["3"] * 7, 0.9), (" 2\n", ["2"] * 10, 1),
        ("maybe", ["yes", "no"] * 5, 0),
    ],
)  # fmt: skip
def test_vqa_accuracy_is_that_of_the_official_code(text, answers, accuracy):
    assert vqa.accuracy(text, answers) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "answers", "similarity"),
    [
        ("Paris", ["paris"], 1), ("  two   words", ["two words"], 1), ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5), ("abcd", ["axyz"], 0), ("12", ["Invoice 12", "13", "12"], 1), ("", ["x"], 0),
    ],
)  # fmt: skip
def test_anls_is_that_of_its_paper(text, answers, similarity):
    assert texts.anls(text, answers) == pytest.approx(similarity)


# Inputs that cannot be used

GOOD = {"id": 1, "text": "x", "objects": []}
BOX = {"label": "cat", "box": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "line 1 is [1]; it must be a JSON object"), ("{", "line 1 is not JSON"),
        ("{}", "id is None; it must be a text or a whole number"), ('{"id": 1.5}', "id is 1.5"),
        ('{"id": 1}', "text is None"), (GOOD | {"objects": 3}, "objects is 3"),
        (GOOD | {"objects": [BOX | {"box": [1, 2, 3]}]}, "box is [1, 2, 3]"),
        (GOOD | {"objects": [BOX | {"box": [1, 2, 3, None]}]}, "box is [1, 2, 3, None]"),
        (GOOD | {"objects": [BOX | {"box": [3, 2, 1, 4]}]}, "x0 < x1"),
        (GOOD | {"objects": [BOX | {"score": 7}]}, "score is 7; it must be a number from 0 to 1"),
        (GOOD | {"objects": [BOX | {"label": None}]}, "label is None"),
        (GOOD | {"objects": [BOX | {"mask": 5}]}, "mask is 5"),
        (GOOD | {"image": {"width": 0, "height": 5}}, "image is {'width': 0"),
        (GOOD | {"objects": [BOX | {"box": [1, 2, 3, float("inf")]}]}, "box is [1, 2, 3, inf]"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read(scored, files, tmp_path, line, message):
    line = line if isinstance(line, str) else json.dumps(line)
    (tmp_path / "out.jsonl").write_text(f"{line}\n{json.dumps(GOOD)}\n")
    code, out, err = scored(*COCO_ARGS)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "images is None; it must be a list"), ({"categories": [3]}, "categories is [3]"),
        ({"images": [{"id": 1}]}, "width, height and file_name"),
        ({"images": []}, "names an image or a category"),
        ({"annotations": [{"image_id": 5000, "category_id": 3, "bbox": [1, 2, 3, 4]}]}, "names an image"),
        ({"categories": [{"id": 3, "name": "a"}] * 2}, "an id occurs again"),
    ],
)  # fmt: skip
def test_annotations_that_cannot_be_read(scored, files, tmp_path, change, message):
    (tmp_path / "annotations.json").write_text(json.dumps(files["annotations"] | change))
    code, out, err = scored(*COCO_ARGS)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": 1}, "answers is None; it must be a list of texts"),
        ({"id": 1, "answers": []}, "answers is []"),
        ({"id": 1, "answers": ["a"], "metric": "bleu"}, "metric is 'bleu'; it must be one of exact"),
        ({"id": 1, "answers": ["a"], "metric": "vqa"}, "at least 4 people"),
        ({"id": 7, "answers": ["a"]}, "id '7' occurs again"),
    ],
)  # fmt: skip
def test_truth_that_cannot_be_read(scored, tmp_path, line, message):
    write(tmp_path / "out.jsonl", [GOOD])
    write(tmp_path / "truth.jsonl", [{"id": "7", "answers": ["a"]}, line])
    code, out, err = scored("out.jsonl", "--exact", "truth.jsonl")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


def test_files_of_something_else(scored, files, tmp_path):
    write(tmp_path / "truth.jsonl", [{"id": "other", "answers": ["a"]}])
    (tmp_path / "empty").write_text("")
    os.mkfifo(tmp_path / "pipe")
    exact = ("--exact", "truth.jsonl")
    for args, message in {
        ("missing", *exact): "missing cannot be read (No such file", (".", *exact): ". is not a file",
        ("pipe", *exact): "pipe is not a file", ("empty", *exact): "empty has no rows",
        ("out.jsonl", *exact): "no id of the rows is in the truth",
        ("out.jsonl", "--exact", "empty"): "empty has no answers",
        ("out.jsonl", "--coco", "empty"): "empty is not JSON",
        ("out.jsonl", "--coco", "annotations.json", "--to-coco", "no/where.json"): "cannot be written",
        ("out.jsonl", "--coco", "truth.jsonl"): "images is None",
    }.items():  # fmt: skip
        code, out, err = scored(*args)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert message in err
    write(tmp_path / "out.jsonl", [row("elsewhere.jpg")])
    code, _, err = scored(*COCO_ARGS)
    assert code == 1
    assert "no row is about an annotated image" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["out.jsonl"], "one of the arguments --coco --exact is required"),
        ([*COCO_ARGS, "--exact", "x"], "not allowed"),
        (["x", "--exact", "y", "--masks"], "--masks goes with --coco"),
        (["x", "--exact", "y", "--to-coco", "z"], "--to-coco goes with --coco"),
        (["x", "--exact", "y", "--score", "none"], "--score goes with --coco"),
        ([*COCO_ARGS, "--score", "luck"], "invalid choice"),
    ],
)  # fmt: skip
def test_wrong_usage(scored, args, message):
    code, out, err = scored(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# The extra, and what is imported


def test_without_the_extra(scored, files, tmp_path, monkeypatch):
    write(tmp_path / "truth.jsonl", [{"id": files["rows"][0]["id"], "answers": ["a"], "metric": "anls"}])
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "anls_star", None)
    for args, package in (
        (COCO_ARGS, "faster-coco-eval"),
        (("out.jsonl", "--exact", "truth.jsonl"), "anls-star"),
    ):
        code, out, err = scored(*args)
        assert (code, out) == (1, "")
        assert err.endswith(f"pip install {package}\n")
        assert err.count("\n") == 1


def test_help_imports_little():
    code = """if True:
        import sys
        from paligemma import evaluate
        try:
            evaluate.main(["--help"])
        except SystemExit:
            pass
        slow = {"torch", "numpy", "PIL", "faster_coco_eval", "anls_star", "supervision"} & set(sys.modules)
        sys.exit(f"imported: {slow}" if slow else 0)"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--to-coco" in done.stdout


# supervision


def test_a_line_as_detections_of_supervision(tmp_path):
    boxes = [(10, 20, 60, 80), (0, 0, 30, 40)]
    (line,) = with_mask_files(
        [row("a.jpg", [found("cat", b, s) for b, s in zip(boxes, (0.9, 0.2), strict=True)])],
        tmp_path / "masks",
    )
    arrays = Detections(**detections(line, tmp_path))
    assert arrays.xyxy.tolist() == [list(map(float, box)) for box in boxes]
    assert arrays.confidence.tolist() == pytest.approx([0.9, 0.2])
    assert arrays.data["class_name"].tolist() == ["cat", "cat"]
    assert arrays.mask.shape == (2, 100, 200)
    assert arrays.mask[0].sum() == 50 * 60
    assert len(arrays[arrays.confidence >= 0.3]) == 1
    assert len(Detections(**detections({"id": 3, "error": "corrupt"}))) == 0
