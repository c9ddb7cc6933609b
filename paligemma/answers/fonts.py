"""Finds a font on this machine that has all letters of a text."""

import io
import os
import struct
import sys
import unicodedata
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ImageFont, features

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Fonts whose file names begin so are tried first; fonts with a VARIANTS word in their names are tried last.
PREFERRED = ("DejaVuSans", "NotoSans-Regular", "NotoSansCJK", "Arial Unicode", "arial")
VARIANTS = ("bold", "black", "light", "thin", "italic", "oblique", "mono", "condensed", "serif", "narrow")


class Fitting(NamedTuple):
    """A font, and the letters of a text that the font does not have."""

    font: Font
    missing: str


@lru_cache(maxsize=256)
def fitting(text: str, size: int) -> Fitting:
    """Pillow's own font if it has every letter, else the first font of this machine that has, else the one
    that lacks the fewest letters."""
    wanted = "".join(sorted({letter for letter in text if _is_visible(letter)}))
    own = ImageFont.load_default(size)
    best = Fitting(own, _missing(own, None, wanted))
    for path in files() if best.missing else ():
        if len(_unmapped(wanted, characters(path))) < len(best.missing):
            with suppress(OSError):  # a font of fixed size, or one that FreeType cannot read
                font = ImageFont.truetype(str(path), size)
                other = Fitting(font, _missing(font, path, wanted))
                best = min(best, other, key=lambda found: len(found.missing))
        if not best.missing:
            break
    if not best.missing and _is_shaped(text) and not (features.check("raqm") and features.check("fribidi")):
        return Fitting(best.font, wanted)  # the letters would be drawn in a wrong order
    return best


def _is_visible(letter: str) -> bool:
    """Whether a letter is drawn: a space, a joiner and a variation selector are not."""
    selector = "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef"
    return not selector and unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp")


def _is_shaped(text: str) -> bool:
    """Whether letters change their shape or order beside one another, as in Hindi and Arabic. Pillow needs
    the library Raqm to draw such text."""
    marks = any(unicodedata.category(letter) in ("Mn", "Mc") for letter in text)
    return marks or any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)


def _missing(font: Font, path: Path | None, wanted: str) -> str:
    """The letters that the font maps to no glyph, or to a blank one."""
    if isinstance(font, ImageFont.FreeTypeFont):
        unmapped = _unmapped(wanted, characters(path) if path else _characters(io.BytesIO(font.font_bytes)))
    else:  # Pillow was built without FreeType
        unmapped = {letter for letter in wanted if not letter.isascii()}
    return "".join(c for c in wanted if c in unmapped or font.getmask(c).getbbox() is None)


def _unmapped(letters: str, mapped: np.ndarray) -> set[str]:
    return {letter for letter in letters if ord(letter) not in mapped}


@cache
def files() -> list[Path]:
    """The outline fonts of this machine, in the order in which they are tried."""
    paths = (path for directory in directories() for path in Path(directory).rglob("*"))
    found = {path for path in paths if path.suffix.lower() in (".ttf", ".otf", ".ttc")}

    def order(path: Path) -> tuple:
        ranks = [n for n, name in enumerate(PREFERRED) if path.name.startswith(name)]
        variant = any(word in path.name.lower() for word in VARIANTS)
        return variant, min(ranks, default=len(PREFERRED)), path.name, str(path)

    return sorted(found, key=order)


def directories() -> list[str]:
    """The directories of fonts on this system."""
    if sys.platform == "win32":
        windows = os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "fonts")
        return [windows, os.path.expandvars(r"%LOCALAPPDATA%\Microsoft\Windows\Fonts")]
    if sys.platform == "darwin":
        return ["/System/Library/Fonts", "/Library/Fonts", os.path.expanduser("~/Library/Fonts")]
    shared = (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    data = [os.environ.get("XDG_DATA_HOME") or "~/.local/share", *shared]
    fonts = [os.path.join(os.path.expanduser(directory), "fonts") for directory in data]
    return [os.path.expanduser("~/.fonts"), *fonts]


@cache
def characters(path: Path) -> np.ndarray:
    """The code points that a font file maps to a glyph, sorted, int32. In a collection, those of its first
    font; an empty array if the file cannot be read."""
    with suppress(OSError), open(path, "rb") as file:
        return _characters(file)
    return np.empty(0, np.int32)


def _characters(file: BinaryIO) -> np.ndarray:
    """Reads the table "cmap": https://learn.microsoft.com/typography/opentype/spec/cmap, formats 4 and 12."""
    try:
        collection = file.read(4) == b"ttcf"
        file.seek(0)
        file.seek(struct.unpack(">12xI", file.read(16))[0] if collection else 0)
        (tables,) = struct.unpack(">4xH6x", file.read(12))
        directory = [struct.unpack(">4s4xII", file.read(16)) for _ in range(tables)]
        offset, length = next((offset, length) for tag, offset, length in directory if tag == b"cmap")
        file.seek(offset)
        cmap, found = file.read(length), [np.empty(0, np.int64)]
        for n in range(struct.unpack_from(">2xH", cmap)[0]):
            platform, encoding, at = struct.unpack_from(">HHI", cmap, 4 + 8 * n)
            if platform == 0 or (platform == 3 and encoding in (1, 10)):
                table = cmap[at:]
                (form,) = struct.unpack_from(">H", table)
                found += _segments(table) if form == 4 else _groups(table) if form == 12 else []
        return np.unique(np.concatenate(found)).astype(np.int32)
    except (OSError, StopIteration, ValueError, IndexError, struct.error):  # a damaged file
        return np.empty(0, np.int32)


def _segments(table: bytes) -> list[np.ndarray]:
    """Format 4: ranges of 16-bit code points. Each has a difference between code point and glyph number,
    or the offset of its list of glyph numbers."""
    count = struct.unpack_from(">6xH", table)[0] // 2
    words = np.frombuffer(table[: len(table) // 2 * 2], ">u2").astype(np.int64)
    places = (7, 8 + count, 8 + 2 * count, 8 + 3 * count)
    ends, starts, deltas, offsets = (words[first : first + count] for first in places)
    if np.maximum(ends - starts + 1, 0).sum() > 1 << 16:
        raise ValueError("ranges overlap")
    found = []
    for n, (start, end, delta, offset) in enumerate(zip(starts, ends, deltas, offsets, strict=True)):
        codes = np.arange(start, min(end, 0xFFFE) + 1)  # 0xFFFF ends the table
        listed = 8 + 3 * count + n + offset // 2 + codes - start
        glyphs = (codes + delta) % 65536 if offset == 0 else words[listed]
        found.append(codes[glyphs != 0])
    return found


def _groups(table: bytes) -> list[np.ndarray]:
    """Format 12: ranges of code points, each with the glyph number of its first code point."""
    (count,) = struct.unpack_from(">12xI", table)
    groups = np.frombuffer(table, ">u4", 3 * count, 16).reshape(-1, 3).astype(np.int64)
    if np.maximum(groups[:, 1] - groups[:, 0] + 1, 0).sum() > 0x110000:
        raise ValueError("ranges overlap, or end after the last code point")
    return [np.arange(start + (glyph == 0), end + 1) for start, end, glyph in groups]
