"""Draws objects on their picture: masks, boxes and labels. Needs only Pillow and NumPy.

A label has the same colour in every picture. Lines have a casing, dark around bright colours and bright
around dark ones, and letters have a filled background, so that both are visible on any picture. Line widths
and letters grow with the picture, whose resolution is kept."""

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
from .objects import Box, Object

HUES = 24  # hues around the colour wheel, each in two shades
TINT = 0.4  # share of the colour in the pixels of a mask
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
DARK, BRIGHT = (20, 20, 20), (255, 255, 255)

Colour = tuple[int, int, int]


def draw(image: Image.Image, objects: Sequence[Object]) -> Image.Image:
    """A copy of the picture with the objects drawn on it: first all masks, then all boxes, then all labels;
    large masks and boxes come before small ones."""
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
    for o in ordered[::-1]:  # small boxes, which have the least room for a label, come first
        font = fitting(o.label, max(10, round(6 + scale / 50))).font
        text = _shortened(o.label, font, image.width - 2 * _margin(font))
        tag = _place(text, o.box, font, line + casing, image.size, boxes, taken) if text else None
        if tag:
            _draw_tag(pen, tag, text, font, colour(o.label), casing)
            taken.append(tag)
    return image


def unreadable(objects: Sequence[Object]) -> list[str]:
    """The labels for which no font of this machine has every letter; `draw` draws an empty box for each
    missing letter."""
    return [label for label in dict.fromkeys(o.label for o in objects) if fitting(label, 10).missing]


def colour(label: str) -> Colour:
    """The colour of a label."""
    number = zlib.crc32(label.encode())
    hue, deep = number % HUES / HUES, number // HUES % 2
    r, g, b = colorsys.hsv_to_rgb(hue, 0.9 if deep else 0.7, 0.7 if deep else 1.0)
    return round(255 * r), round(255 * g), round(255 * b)


def contrast(ground: Colour) -> Colour:
    """DARK or BRIGHT, whichever is easier to read on a colour."""
    weighted = zip((0.2126, 0.7152, 0.0722), ground, strict=True)
    luminance = sum(weight * (value / 255) ** 2.2 for weight, value in weighted)
    return DARK if luminance > 0.18 else BRIGHT  # at 0.18 WCAG's contrast to black equals that to white


def _draw_mask(image: Image.Image, o: Object, line: int, casing: int) -> None:
    """Tint the pixels of the mask, and draw a line along the inside of its edge."""
    inside = o.box_mask
    if inside is None:
        return
    own = colour(o.label)
    part = image.crop(o.box)
    values = np.asarray(part).astype(np.float32)
    values[inside] += TINT * (np.array(own) - values[inside])
    pad = line + casing
    padded = Image.fromarray(np.pad(np.where(inside, np.uint8(255), np.uint8(0)), pad))
    for width, paint in ((pad, contrast(own)), (line, own)):
        blurred = np.asarray(padded.filter(ImageFilter.BoxBlur(width)))[pad:-pad, pad:-pad]
        values[inside & (blurred < 255)] = paint  # the pixels that are at most `width` from the edge
    image.paste(Image.fromarray(np.rint(values).astype(np.uint8)), o.box)


def _draw_box(pen: ImageDraw.ImageDraw, size: tuple[int, int], o: Object, line: int, casing: int) -> None:
    """Draw a frame around the box; at the edges of the picture the frame is inside the box."""
    own = colour(o.label)
    for width, out, paint in ((line + 2 * casing, line + casing, contrast(own)), (line, line, own)):
        x0, y0, x1, y1 = _grown(o.box, out, size, (line + 2 * casing - width) // 2)
        if x0 < x1 and y0 < y1:  # a very small box has room for the casing only
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=paint, width=width)


def _grown(box: Box, by: int, size: tuple[int, int], margin: int) -> Box:
    """The box, larger by `by` pixels on each side, and at least `margin` pixels from the picture's edge."""
    (x0, y0, x1, y1), (width, height) = box, size
    x0, y0 = max(x0 - by, margin), max(y0 - by, margin)
    return x0, y0, min(x1 + by, width - margin), min(y1 + by, height - margin)


def _margin(font: Font) -> int:
    """The pixels between the letters and the edge of their background."""
    return max(2, round(_height(font) / 5))


def _height(font: Font) -> int:
    return round(font.getbbox("Ag|")[3])


def _shortened(label: str, font: Font, width: int) -> str:
    """The label on one line, cut and ended with "…" if wider than `width` pixels; "" if nothing fits."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    fitting = bisect_right(range(1, len(label)), width, key=lambda n: font.getlength(f"{label[:n]}…"))
    return f"{label[:fitting]}…" if fitting else ""


def _place(
    text: str, box: Box, font: Font, reach: int, size: tuple[int, int], boxes: list[Box], taken: list[Box]
) -> Box | None:
    """The place of a label's background where it hides least: above, below, in a corner of, or beside its
    box. None if it would hide another label or most of an object in every place: the box is then drawn
    without its label.

    reach: the width of the frame around the box. boxes: of all objects. taken: the labels already placed."""
    margin = _margin(font)
    w = math.ceil(font.getlength(text)) + 2 * margin
    h = max(_height(font), math.ceil(font.getbbox(text)[3])) + 2 * margin

    def hidden(tag: Box, others: list[Box]) -> list[float]:
        return [_common(tag, other) / _area(other) for other in others]

    def cost(place: tuple[int, Box]) -> float:
        n, tag = place
        return sum(hidden(tag, boxes)) + 2 * sum(hidden(tag, taken)) + n / 100

    tag = min(enumerate(_places(box, w, h, reach, size)), key=cost)[1]
    return tag if max(hidden(tag, boxes)) <= 0.6 and max(hidden(tag, taken), default=0) <= 0.05 else None


def _places(box: Box, w: int, h: int, reach: int, size: tuple[int, int]) -> Iterator[Box]:
    """The places for a label of w x h pixels at a box, each inside the picture, the preferred ones first."""
    x0, y0, x1, y1 = _grown(box, reach, size, 0)
    left, top, right, bottom = x0 + reach, y0 + reach, x1 - reach - w, y1 - reach - h  # inside the box
    outer = (
        (x0, y0 - h),
        (x0, y1),
        (left, top),
        (x1 - w, y0 - h),
        (x1 - w, y1),
        (left, bottom),
        (right, top),
    )
    beside = ((x1, y0), (x0 - w, y0), (x1, y1 - h), (x0 - w, y1 - h))
    for x, y in (*outer, *beside, (right, bottom)):
        x, y = min(max(x, 0), max(size[0] - w, 0)), min(max(y, 0), max(size[1] - h, 0))
        yield x, y, x + w, y + h


def _draw_tag(pen: ImageDraw.ImageDraw, tag: Box, text: str, font: Font, ground: Colour, casing: int) -> None:
    """Draw a label on its background, the rectangle `tag`."""
    x0, y0, x1, y1 = tag
    margin, ink = _margin(font), contrast(ground)
    frame = (x0, y0, x1 - 1, y1 - 1)
    pen.rounded_rectangle(frame, radius=margin, fill=ground, outline=ink, width=casing)
    pen.text((x0 + margin, y0 + margin), text, font=font, fill=ink)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(a: Box, b: Box) -> int:
    """The area of the intersection."""
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def check_writable(path: str | Path, *, directory: bool = False) -> None:
    """Raise PaliGemmaError if a picture could not be saved at `path`. directory: `path` is a directory, which
    is created if necessary."""
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
        raise PaliGemmaError(f"{path} does not name a picture: end it in .png, .jpg or .webp")
    check_replaceable(path)


def save_mask(o: Object, directory: Path, number: int, prefix: str = "") -> Path | None:
    """Save the mask as a PNG of the picture's size, 255 where the object is. Returns the path, or None if the
    object has no mask. The file's name is the prefix, the number and the label."""
    mask = o.mask
    if mask is None:
        return None
    name = re.sub(r"\W+", "-", o.label).strip("-")[:40]
    path = directory / f"{prefix}{number:02}{'-' if name else ''}{name}.png"
    save(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))), path)
    return path


def save(image: Image.Image, path: str | Path) -> None:
    """Save the picture in the format of its suffix, completely or not at all. A symbolic link and the mode of
    an existing file are kept."""
    path = Path(path)
    try:
        with replacing(path) as file:
            image.save(file, FORMATS[path.suffix.lower()], quality=95)
    except ValueError as error:  # Pillow: the format cannot store a picture of this size
        problem = f"{image.width} x {image.height} pixels cannot be written as {path.suffix} ({error})"
        raise PaliGemmaError(f"{path}: {problem}: use .png") from None
