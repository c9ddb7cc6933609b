"""Objects drawn on their picture: masks, boxes and labels. Pillow only.

A label has the same colour in every picture. Lines have a casing, dark around bright colours and bright
around deep ones, and letters on a ground of their own, so that both can be seen on anything. Their sizes
follow the picture's, whose resolution stays."""

import colorsys
import math
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ..command import check_replaceable, replacing
from ..errors import PaliGemmaError
from .fonts import Font, fitting
from .parsing import Box, Object

HUES = 24  # colours around the wheel, each in two shades
TINT = 0.4  # of the colour, on the pixels of a mask
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DARK, BRIGHT = (20, 20, 20), (255, 255, 255)

Colour = tuple[int, int, int]


def draw(image: Image.Image, objects: Sequence[Object]) -> Image.Image:
    """A copy of the picture with the objects on it: all masks, then all boxes, large ones first, then all
    labels."""
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    scale = math.sqrt(image.width * image.height)
    line, casing = max(1, round(scale / 200)), max(1, round(scale / 900))
    ordered = sorted(objects, key=lambda o: -_area(o.box))
    for o in ordered:
        _draw_mask(image, o, line, casing)
    pen = ImageDraw.Draw(image)
    for o in ordered:
        _draw_box(pen, image.size, o, line, casing)
    boxes, taken = [o.box for o in objects], []
    for o in ordered[::-1]:  # small ones, which have the least room, come first
        font = fitting(o.label, max(10, round(6 + scale / 50))).font
        text = _shortened(o.label, font, image.width - 2 * _margin(font))
        tag = _place(text, o.box, font, line + casing, image.size, boxes, taken) if text else None
        if tag:
            _draw_tag(pen, tag, text, font, colour(o.label), casing)
            taken.append(tag)
    return image


def unreadable(objects: Sequence[Object]) -> list[str]:
    """The labels that no font of this machine has every letter of; `draw` leaves an empty box for each letter
    that is missing."""
    return [label for label in dict.fromkeys(o.label for o in objects) if fitting(label, 10).missing]


def colour(label: str) -> Colour:
    """The one of a label."""
    number = zlib.crc32(label.encode())
    hue, deep = number % HUES / HUES, number // HUES % 2
    r, g, b = colorsys.hsv_to_rgb(hue, 0.9 if deep else 0.7, 0.7 if deep else 1.0)
    return round(255 * r), round(255 * g), round(255 * b)


def contrast(ground: Colour) -> Colour:
    """What is read best on a colour."""
    luminance = sum(
        weight * (value / 255) ** 2.2 for weight, value in zip((0.2126, 0.7152, 0.0722), ground, strict=True)
    )
    return DARK if luminance > 0.18 else BRIGHT  # where WCAG's contrast ratios to black and white are equal


def _draw_mask(image: Image.Image, o: Object, line: int, casing: int) -> None:
    """The pixels tinted, with a line along the inside of their edge."""
    inside = o.box_mask
    if inside is None:
        return
    own = colour(o.label)
    part = image.crop(o.box)
    values = np.asarray(part).astype(np.float32)
    values[inside] += TINT * (np.array(own) - values[inside])
    padded = Image.fromarray(np.pad(np.where(inside, np.uint8(255), np.uint8(0)), line + casing))
    for width, paint in ((line + casing, contrast(own)), (line, own)):
        near = (
            np.asarray(padded.filter(ImageFilter.BoxBlur(width)))[
                line + casing : -line - casing, line + casing : -line - casing
            ]
            < 255
        )
        values[inside & near] = paint
    image.paste(Image.fromarray(np.rint(values).astype(np.uint8)), o.box)


def _draw_box(pen: ImageDraw.ImageDraw, size: tuple[int, int], o: Object, line: int, casing: int) -> None:
    """A frame around the box, inside it where the picture ends."""
    own = colour(o.label)
    for width, out, paint in ((line + 2 * casing, line + casing, contrast(own)), (line, line, own)):
        x0, y0, x1, y1 = _grown(o.box, out, size, (line + 2 * casing - width) // 2)
        if x0 < x1 and y0 < y1:  # or there is no room for more than the casing
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=paint, width=width)


def _grown(box: Box, by: int, size: tuple[int, int], margin: int) -> Box:
    """A box with some pixels more on each side, but not nearer to the picture's edge than the margin."""
    (x0, y0, x1, y1), (width, height) = box, size
    return (
        max(x0 - by, margin),
        max(y0 - by, margin),
        min(x1 + by, width - margin),
        min(y1 + by, height - margin),
    )


def _margin(font: Font) -> int:
    """Between letters and the edge of their ground."""
    return max(2, round(_height(font) / 5))


def _height(font: Font) -> int:
    return round(font.getbbox("Ag|")[3])


def _shortened(label: str, font: Font, width: int) -> str:
    """As much of a label as is not wider than that many pixels."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    fitting = bisect_right(range(1, len(label)), width, key=lambda n: font.getlength(f"{label[:n]}…"))
    return f"{label[:fitting]}…" if fitting else ""


def _place(
    text: str, box: Box, font: Font, reach: int, size: tuple[int, int], boxes: list[Box], taken: list[Box]
) -> Box | None:
    """Where the ground of a label hides the least: above, below, in a corner of or beside its box. None where
    it would hide another label or most of an object wherever it is: the colour and the box say enough."""
    margin = _margin(font)
    w, h = (
        math.ceil(font.getlength(text)) + 2 * margin,
        max(_height(font), math.ceil(font.getbbox(text)[3])) + 2 * margin,
    )

    def hidden(tag: Box, others: list[Box]) -> list[float]:
        return [_common(tag, other) / _area(other) for other in others]

    def cost(place: tuple[int, Box]) -> float:
        n, tag = place
        return sum(hidden(tag, boxes)) + 2 * sum(hidden(tag, taken)) + n / 100

    tag = min(enumerate(_places(box, w, h, reach, size)), key=cost)[1]
    return tag if max(hidden(tag, boxes)) <= 0.6 and max(hidden(tag, taken), default=0) <= 0.05 else None


def _places(box: Box, w: int, h: int, reach: int, size: tuple[int, int]) -> Iterator[Box]:
    """A label of w x h pixels at a box, the best places first, each inside the picture."""
    x0, y0, x1, y1 = _grown(box, reach, size, 0)
    inner = (x0 + reach, y0 + reach, x1 - reach - w, y1 - reach - h)
    corners = [
        (x0, y0 - h),
        (x0, y1),
        (inner[0], inner[1]),
        (x1 - w, y0 - h),
        (x1 - w, y1),
        (inner[0], inner[3]),
        (inner[2], inner[1]),
    ]
    for x, y in [*corners, (x1, y0), (x0 - w, y0), (x1, y1 - h), (x0 - w, y1 - h), (inner[2], inner[3])]:
        x, y = min(max(x, 0), max(size[0] - w, 0)), min(max(y, 0), max(size[1] - h, 0))
        yield x, y, x + w, y + h


def _draw_tag(pen: ImageDraw.ImageDraw, tag: Box, text: str, font: Font, ground: Colour, casing: int) -> None:
    x0, y0, x1, y1 = tag
    margin = _margin(font)
    pen.rounded_rectangle(
        (x0, y0, x1 - 1, y1 - 1), radius=margin, fill=ground, outline=contrast(ground), width=casing
    )
    pen.text((x0 + margin, y0 + margin), text, font=font, fill=contrast(ground))


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(a: Box, b: Box) -> int:
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def check_writable(path: str | Path, *, directory: bool = False) -> None:
    """Raise PaliGemmaError for a picture that could not be saved there; as a directory it is made."""
    path = Path(path)
    if directory:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PaliGemmaError(f"{path} cannot be made a directory: {error.strerror}") from None
        if not os.access(path, os.W_OK):
            raise PaliGemmaError(f"{path} cannot be written: it is read-only")
        return
    if path.is_dir():
        raise PaliGemmaError(f"{path} is a directory: give the name of a picture, such as {path / 'out.png'}")
    if path.suffix.lower() not in FORMATS:
        raise PaliGemmaError(f"{path} has no name of a picture: end it in .png, .jpg or .webp")
    check_replaceable(path)


def save_mask(o: Object, directory: Path, number: int) -> Path | None:
    """The mask as a PNG of the picture's size, 255 where the object is; its path, or none where there is no
    mask."""
    mask = o.mask
    if mask is None:
        return None
    name = re.sub(r"\W+", "-", o.label).strip("-")[:40]
    path = directory / f"{number:02}{'-' if name else ''}{name}.png"
    save(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))), path)
    return path


def save(image: Image.Image, path: str | Path) -> None:
    """Whole or not at all, in the format of the name's end; a symbolic link and an existing file's mode
    stay."""
    path = Path(path)
    try:
        with replacing(path) as file:
            image.save(file, FORMATS[path.suffix.lower()], quality=95)
    except ValueError as error:  # Pillow's way to say that a format has no pictures of that size
        raise PaliGemmaError(
            f"{path} cannot be written as {path.suffix}, {image.width} x {image.height} pixels ({error}): use .png"
        ) from None
