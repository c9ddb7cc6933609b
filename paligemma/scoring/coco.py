"""Scores boxes and masks by COCO's rules with faster-coco-eval, and writes them as COCO's results."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import PaliGemmaError
from ..fields import is_whole, real
from .rows import Found, Problems, Row, read_json, read_mask, wrong

# COCO's summary in its order: average precision and average recall, over IoU 0.50 to 0.95 unless named
SUMMARY = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
SUMMARY += ("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


class Annotations:
    """Images, categories and true objects in COCO's format.

    Images and categories have numbers from 1 here, because the ids of a file may be texts; `ids` has them."""

    def __init__(self, values: Any, file: str = "annotations"):
        """values: what the file holds. Raises PaliGemmaError if it is not in COCO's format."""
        parts = {}
        for name in ("images", "categories", "annotations"):
            parts[name] = part = values.get(name) if isinstance(values, dict) else None
            if not isinstance(part, list) or not all(isinstance(one, dict) for one in part):
                raise wrong(file, name, part, "a list of objects, as in COCO's annotations")
        self.ids = {name: [one.get("id") for one in parts[name]] for name in ("images", "categories")}
        self._numbers = {name: _numbered(ids, f"{file}: {name}") for name, ids in self.ids.items()}
        self.images = [_image(one, n, file) for n, one in enumerate(parts["images"], 1)]
        self.names = [str(one.get("name")) for one in parts["categories"]]
        self.objects = [self._true(one, n, file) for n, one in enumerate(parts["annotations"], 1)]
        labels, files = enumerate(self.names, 1), ((one["id"], one["file_name"]) for one in self.images)
        self._by_label = _unique((key, n) for n, name in labels for key in {name, folded(name)})
        self._by_file = _unique(
            (key, n) for n, file in files if file for key in {file, Path(file).name, Path(file).stem}
        )

    def _true(self, one: dict, n: int, file: str) -> dict:
        where = f"{file}: annotation {one.get('id', n)!r}"
        numbers = [
            self._numbers[p].get(str(one.get(f)))
            for p, f in (("images", "image_id"), ("categories", "category_id"))
        ]
        box = one.get("bbox")
        sides = [real(value) for value in box] if isinstance(box, list) else []
        if None in numbers:
            raise PaliGemmaError(f"{where} names an image or a category that the file does not have")
        if len(sides) != 4 or not all(map(math.isfinite, sides)):
            raise wrong(where, "bbox", box, "x, y, width, height in pixels")
        area = real(one.get("area"))
        area = area if math.isfinite(area) else sides[2] * sides[3]
        true = {"id": n, "image_id": numbers[0], "category_id": numbers[1], "bbox": sides, "area": area}
        true["iscrowd"] = int(bool(one.get("iscrowd")))
        return true | ({"segmentation": one["segmentation"]} if one.get("segmentation") else {})

    def image(self, row: Row) -> int | None:
        """The number of a row's image. Its name is a path, a file's name with or without the suffix, or an
        id."""
        ids = self._numbers["images"]
        for name in row.names:
            if isinstance(name, int):
                number = ids.get(str(name))
            else:
                file, stem = Path(name).name, Path(name).stem
                found = (*map(self._by_file.get, (name, file, stem)), ids.get(name), ids.get(stem))
                number = next((n for n in found if n), None)
            if number:
                return number
        return None

    def category(self, label: str) -> int | None:
        """The number of a label's category; capital letters, hyphens and underscores do not count."""
        return self._by_label.get(label) or self._by_label.get(folded(label))

    def dataset(self) -> dict:
        """COCO's format, with the numbers as ids."""
        categories = [{"id": n, "name": name} for n, name in enumerate(self.names, 1)]
        images, objects = ([dict(one) for one in part] for part in (self.images, self.objects))
        return {"info": {}, "images": images, "categories": categories, "annotations": objects}


def read_annotations(path: str | Path) -> Annotations:
    return Annotations(read_json(path), str(path))


def _numbered(ids: list, where: str) -> dict[str, int]:
    if bad := [one for one in ids if not isinstance(one, str) and not is_whole(one)]:
        raise wrong(where, "id", bad[0], "a whole number or a text")
    numbers = {str(one): n for n, one in enumerate(ids, 1)}
    if len(numbers) < len(ids):
        raise PaliGemmaError(f"{where}: an id occurs again: give each its own")
    return numbers


def _image(one: dict, n: int, file: str) -> dict:
    sides, name = [one.get("width"), one.get("height")], one.get("file_name", "")
    if not all(is_whole(side) and real(side) > 0 for side in sides) or not isinstance(name, str):
        raise wrong(f"{file}: images", "an image", one, "an object with width, height and file_name")
    return {"id": n, "width": sides[0], "height": sides[1], "file_name": name}


def _unique(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The pairs whose key belongs to one number only."""
    numbers: dict[str, set[int]] = {}
    for key, number in pairs:
        numbers.setdefault(key, set()).add(number)
    return {key: next(iter(some)) for key, some in numbers.items() if len(some) == 1}


def folded(label: str) -> str:
    return " ".join(label.casefold().replace("_", " ").replace("-", " ").split())


def results(
    rows: Iterable[Row], truth: Annotations, problems: Problems, *, score: str = "score"
) -> list[dict]:
    """COCO's results, with the numbers of the annotations as ids, and "mask", a path or None. score: the name
    of the score to use; "none" gives 1 to each object."""
    found, seen = [], set()
    for row in rows:
        number = truth.image(row)
        if number is None:
            problems.add("rows whose image is not annotated, which are left out", row.id)
            continue
        seen.add(number)
        image = truth.images[number - 1]
        width, height = size = image["width"], image["height"]
        given = row.size or size
        if given != size:
            problems.add("images of another size than annotated, whose boxes are scaled", row.id)
        for one in row.objects:
            category = truth.category(one.label)
            if category is None:
                problems.add("objects whose label is not a category, which are left out", one.label)
                continue
            if score != "none" and score not in one.scores:
                problems.add(f"objects without a {score}, which get 1", row.id)
            box = _bbox(one, width / given[0], height / given[1])
            scored = {"bbox": box, "score": one.scores.get(score, 1.0), "mask": one.mask}
            found.append({"image_id": number, "category_id": category, **scored})
    for image in truth.images:
        if image["id"] not in seen:
            name = image["file_name"] or truth.ids["images"][image["id"] - 1]
            problems.add("annotated images without a row, whose objects count as not found", name)
    if not seen:
        raise PaliGemmaError(
            "no row is about an annotated image: the id of a row must be the image's file or id"
        )
    return found


def _bbox(one: Found, across: float, down: float) -> list[float]:
    x0, y0, x1, y1 = one.box
    return [x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down]


def with_masks(found: list[dict], truth: Annotations) -> list[dict]:
    """The results with "segmentation", COCO's run lengths, in place of "mask". Raises PaliGemmaError for a
    mask that cannot be read, or whose size is not that of its annotated image."""
    encoded = []
    for one in found:
        image, path = truth.images[one["image_id"] - 1], one["mask"]
        rest = {name: value for name, value in one.items() if name != "mask"}
        lengths = _run_lengths(path, (image["width"], image["height"])) if path else None
        encoded.append(rest | ({"segmentation": lengths} if lengths else {}))
    return encoded


def _run_lengths(path: Path, size: tuple[int, int]) -> dict:
    import numpy as np

    lengths = library().mask.encode(np.asfortranarray(read_mask(path, size), np.uint8))
    return {"size": list(lengths["size"]), "counts": lengths["counts"].decode("ascii")}


def library() -> Any:
    try:
        import faster_coco_eval
    except ImportError:
        raise PaliGemmaError("--coco needs faster-coco-eval: pip install faster-coco-eval") from None
    return faster_coco_eval


def average_precision(truth: Annotations, found: list[dict], *, masks: bool = False) -> dict[str, Any]:
    """COCO's summary by the names in SUMMARY, and AP_of_category. A value is None where there is no true
    object. masks: compare the masks of `with_masks` instead of boxes; objects without a mask are left out."""
    tools, kind, left_out = library(), "bbox", "mask"
    if masks:
        kind, left_out = "segm", "bbox"  # without the box, the area of an object is that of its mask
        found = [one for one in found if "segmentation" in one]
        for one in truth.objects:
            if not _is_segmentation(one.get("segmentation"), truth.images[one["image_id"] - 1]):
                wanted = "polygons or run lengths of each object: leave out --masks, or mend them"
                raise wrong(f"annotation {one['id']}", "segmentation", one.get("segmentation"), wanted)
    found = [{name: value for name, value in one.items() if name != left_out} for one in found]
    silent = {"print_function": lambda *_: None}
    dataset = tools.COCO(truth.dataset(), **silent)
    judge = tools.COCOeval_faster(dataset, dataset.loadRes(found), kind, **silent)
    judge.run()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, categories)
    of_category = precision.mean(axis=(0, 1))  # -1 for a category without true objects
    summary = {name: _share(value) for name, value in zip(SUMMARY, judge.stats, strict=False)}
    by_name = {name: _share(value) for name, value in zip(truth.names, of_category, strict=True)}
    return {**summary, "AP_of_category": by_name}


def _is_segmentation(value: Any, image: dict) -> bool:
    """Whether a value is polygons, of x and y by turns, or run lengths of the image's size."""
    if isinstance(value, dict):
        counts, size = value.get("counts"), value.get("size")
        known = isinstance(counts, str) or (isinstance(counts, list) and all(map(is_whole, counts)))
        return known and size == [image["height"], image["width"]]
    return isinstance(value, list) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(math.isfinite(real(number)) for number in polygon)
        for polygon in value
    )


def _share(value: float) -> float | None:
    return None if value < 0 else round(float(value), 4)


def exported(found: list[dict], truth: Annotations) -> list[dict]:
    """COCO's results, with the ids of the annotations."""
    images, categories = truth.ids["images"], truth.ids["categories"]
    return [
        {
            **one,
            "image_id": images[one["image_id"] - 1],
            "category_id": categories[one["category_id"] - 1],
        }
        for one in found
    ]
