"""Reads the answers of `python -m paligemma.batch`: a line of JSON for each input, {"id", ...} or {"id",
"error"}.

The fields of a line are those of `python -m paligemma.generate --json`."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PaliGemmaError
from ..fields import is_whole, real, shown

LONGEST = 1 << 26  # bytes of a line; an answer of 100,000 tokens has 3 million
SCORES = ("score", "box_score", "label_score")


@dataclass(frozen=True)
class Found:
    """An object of an answer."""

    label: str
    box: Any  # four numbers: x0, y0, x1, y1 in pixels
    scores: dict[str, float]  # by the names in SCORES, those that the line has
    mask: Path | None  # a picture of the image's size


@dataclass(frozen=True)
class Row:
    """A line of the answers."""

    id: str
    names: tuple[str | int, ...]  # what may name its image: image_id, image.path, id; those that it has
    size: tuple[int, int] | None = None  # width, height of its image
    text: str = ""
    objects: tuple[Found, ...] = ()
    error: str | None = None


@dataclass
class Problems:
    """What is wrong with the inputs of an evaluation but does not prevent it: the ids or labels of each kind,
    in the order in which they were met."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: Any) -> None:
        self.found.setdefault(kind, []).append(str(name))

    def lines(self) -> list[str]:
        """One line for each kind, with the number and the first of them."""
        return [f"{kind}: {len(names)} (the first: {names[0]!r})" for kind, names in self.found.items()]


def read_rows(path: str | Path, problems: Problems) -> dict[str, Row]:
    """The rows of a file by their ids. The last row of an id counts. Raises PaliGemmaError for a file that is
    not the output of paligemma.batch."""
    rows: dict[str, Row] = {}
    for where, line in json_lines(path, problems):
        row = _row(line, where, Path(path).parent)
        if row.id in rows:
            problems.add("ids that occur again, of which the last row counts", row.id)
        rows[row.id] = row
    if not rows:
        raise PaliGemmaError(f"{path} has no rows: give the output of python -m paligemma.batch")
    for row in rows.values():
        if row.error is not None:
            problems.add("rows with an error, which count as wrong", row.id)
    return rows


def json_lines(path: str | Path, problems: Problems) -> Iterator[tuple[str, dict]]:
    """Each JSON object of a file with one in every line, and where it is, as "FILE, line N". An unfinished
    last line, which an interrupted program leaves, is skipped."""
    with opened(path) as file:
        number = 0
        for data in iter(lambda: file.readline(LONGEST), b""):
            number += 1
            where = f"{path}, line {number}"
            if len(data) == LONGEST:
                raise PaliGemmaError(f"{where} has more than {LONGEST >> 20} MB: the file is not JSON lines")
            if not data.strip():
                continue
            try:
                line = json.loads(data.decode("utf-8-sig"))
            except (RecursionError, ValueError) as error:
                if number > 1 and not data.endswith(b"\n"):
                    problems.add("unfinished last lines, which are left out", where)
                    return
                raise PaliGemmaError(f"{where} is not JSON ({error}): give JSON lines") from None
            if not isinstance(line, dict):
                raise PaliGemmaError(f"{where} is {shown(line)}; it must be a JSON object")
            yield where, line


def opened(path: str | Path):
    """The file, open for reading bytes. Raises PaliGemmaError if it cannot be read."""
    if Path(path).exists() and not Path(path).is_file():
        raise PaliGemmaError(f"{path} is not a file: give the path of a file")
    try:
        return open(path, "rb")
    except OSError as error:
        raise PaliGemmaError(f"{path} cannot be read ({error.strerror}): check the path") from None


def read_json(path: str | Path) -> Any:
    """What a file of JSON holds. Raises PaliGemmaError if it cannot be read."""
    with opened(path) as file:
        try:
            return json.loads(file.read().decode("utf-8-sig"))
        except (RecursionError, ValueError) as error:
            raise PaliGemmaError(f"{path} is not JSON ({error}): check the path") from None


def id_of(line: dict, where: str) -> str:
    """The id of a line as text, so that 7 and "7" are the same."""
    value = line.get("id")
    if not isinstance(value, str) and not is_whole(value):
        raise wrong(where, "id", value, "a text or a whole number")
    return str(value)


def wrong(where: str, name: str, value: Any, wanted: str) -> PaliGemmaError:
    return PaliGemmaError(f"{where}: {name} is {shown(value)}; it must be {wanted}")


def _row(line: dict, where: str, folder: Path) -> Row:
    image = line.get("image")
    path = image.get("path") if isinstance(image, dict) else image
    given: list[Any] = [line.get("image_id"), path, line.get("id")]
    names = tuple(name for name in given if isinstance(name, str) or is_whole(name))
    row_id = id_of(line, where)
    if line.get("error") is not None:
        return Row(row_id, names, error=str(line["error"]))
    text, objects = line.get("text"), line.get("objects", [])
    size: Any = None
    if not isinstance(text, str):
        raise wrong(where, "text", text, "the text of an answer; is this the output of paligemma.batch?")
    if not isinstance(objects, list) or not all(isinstance(o, dict) for o in objects):
        raise wrong(where, "objects", objects, "a list of objects")
    if isinstance(image, dict) and "width" in image:
        size = image.get("width"), image.get("height")
        if not all(is_whole(side) and real(side) > 0 for side in size):
            raise wrong(where, "image", image, "an object with width and height in pixels")
    return Row(row_id, names, size, text, tuple(_found(o, where, folder) for o in objects))


def _found(values: dict, where: str, folder: Path) -> Found:
    label, box, mask = values.get("label"), values.get("box"), values.get("mask")
    if not isinstance(label, str):
        raise wrong(where, "label", label, "a text")
    corners = [real(value) for value in box] if isinstance(box, list) else []
    if len(corners) != 4 or not all(map(math.isfinite, corners)):
        raise wrong(where, "box", box, "x0, y0, x1, y1 in pixels")
    x0, y0, x1, y1 = corners
    if not (x0 < x1 and y0 < y1):
        raise wrong(where, "box", box, "x0, y0, x1, y1 with x0 < x1 and y0 < y1")
    scores = {name: real(values[name]) for name in SCORES if values.get(name) is not None}
    for name, score in scores.items():
        if not 0 <= score <= 1:
            raise wrong(where, name, values[name], "a number from 0 to 1")
    if mask is not None and not isinstance(mask, str):
        raise wrong(where, "mask", mask, "the path of a picture")
    return Found(label, (x0, y0, x1, y1), scores, mask_path(mask, folder) if mask else None)


def mask_path(name: str, folder: Path) -> Path:
    """The path of a mask, which is relative to the current directory or to the folder of the answers."""
    beside = folder / name
    return beside if beside.exists() and not Path(name).exists() else Path(name)


def detections(line: dict, folder: str | Path = "") -> dict[str, Any]:
    """Arrays for `supervision.Detections(**detections(line))` from a line of JSON: those of
    `Answer.detections()`. Masks are read from their files, which the line names relative to the current
    directory or to `folder`. Raises PaliGemmaError for another kind of line."""
    import numpy as np

    from ..answers.objects import Answer, Object

    row = _row({"id": "", **line}, "the line", Path(folder))
    size = row.size or (1, 1)
    objects: list[Any] = [
        Object(o.label, o.box, o.scores.get("score"), (), None, size, "") for o in row.objects
    ]
    arrays = Answer(objects, size).detections()
    if any(o.mask for o in row.objects):
        empty = np.zeros(size[::-1], bool)
        arrays["mask"] = np.stack([read_mask(o.mask, size) if o.mask else empty for o in row.objects])
    return arrays


def read_mask(path: Path, size: tuple[int, int]) -> Any:  # (H, W) bool
    """The mask in a picture of `size`, width and height. Raises PaliGemmaError for another size, or if it
    cannot be read."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.size == size:
                return np.asarray(image.convert("L")) > 127
            sizes = f"{image.width} x {image.height} pixels, and its image has {size[0]} x {size[1]}"
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PaliGemmaError(f"mask {path} cannot be read ({error}): keep the masks of the answers") from None
    raise PaliGemmaError(f"mask {path} has {sizes}: a mask must have the size of its image")
