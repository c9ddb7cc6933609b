"""A font that has the letters of a text, among those of this machine."""

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

PREFERRED = (
    "DejaVuSans",
    "NotoSans-Regular",
    "NotoSansCJK",
    "Arial Unicode",
    "arial",
)  # names begin so; the others come after these, plain ones first
VARIANTS = ("bold", "black", "light", "thin", "italic", "oblique", "mono", "condensed", "serif", "narrow")


class Fitting(NamedTuple):
    """A font, and the letters of the text that it does not have."""

    font: Font
    missing: str


@lru_cache(maxsize=256)
def fitting(text: str, size: int) -> Fitting:
    """Pillow's own font where it has every letter, else the first of this machine's that has, else the one
    that lacks the fewest."""
    wanted = "".join(sorted({letter for letter in text if _is_visible(letter)}))
    own = ImageFont.load_default(size)
    best = Fitting(own, _missing(own, None, wanted))
    for path in files() if best.missing else ():
        if len(_unmapped(wanted, characters(path))) < len(best.missing):
            with suppress(OSError):  # a font of fixed size, or one that FreeType does not read
                font = ImageFont.truetype(str(path), size)
                best = min(
                    best, Fitting(font, _missing(font, path, wanted)), key=lambda found: len(found.missing)
                )
        if not best.missing:
            break
    if not best.missing and _is_shaped(text) and not (features.check("raqm") and features.check("fribidi")):
        return Fitting(best.font, wanted)  # its letters would be in a wrong order
    return best


def _is_visible(letter: str) -> bool:
    """Whether a letter is drawn itself: not a space, a joiner, or what chooses a variant of the letter before
    it."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Zs", "Zl", "Zp") and not (
        "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef"
    )


def _is_shaped(text: str) -> bool:
    """Whether its letters change or change places beside one another, as in Hindi and Arabic, which only Raqm
    knows."""
    return any(
        unicodedata.category(letter) in ("Mn", "Mc") or unicodedata.bidirectional(letter) in ("R", "AL")
        for letter in text
    )


def _missing(font: Font, path: Path | None, wanted: str) -> str:
    """The letters that the font does not map to a glyph, or for which that glyph is blank."""
    if isinstance(font, ImageFont.FreeTypeFont):
        unmapped = _unmapped(wanted, characters(path) if path else _characters(io.BytesIO(font.font_bytes)))
    else:  # Pillow without FreeType
        unmapped = {letter for letter in wanted if not letter.isascii()}
    return "".join(
        letter for letter in wanted if letter in unmapped or font.getmask(letter).getbbox() is None
    )


def _unmapped(letters: str, mapped: np.ndarray) -> set[str]:
    return {letter for letter in letters if ord(letter) not in mapped}


@cache
def files() -> list[Path]:
    """The outline fonts of this machine, in the order in which they are tried."""
    found = {
        path
        for directory in directories()
        for path in Path(directory).rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc")
    }

    def order(path: Path) -> tuple:
        preferred = next(
            (n for n, name in enumerate(PREFERRED) if path.name.startswith(name)), len(PREFERRED)
        )
        return any(word in path.name.lower() for word in VARIANTS), preferred, path.name, str(path)

    return sorted(found, key=order)


def directories() -> list[str]:
    if sys.platform == "win32":
        return [
            os.path.join(os.environ.get("WINDIR", r"C:\Windows"), "fonts"),
            os.path.expandvars(r"%LOCALAPPDATA%\Microsoft\Windows\Fonts"),
        ]
    if sys.platform == "darwin":
        return ["/System/Library/Fonts", "/Library/Fonts", os.path.expanduser("~/Library/Fonts")]
    data = [
        os.environ.get("XDG_DATA_HOME") or "~/.local/share",
        *(os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":"),
    ]
    return [
        os.path.expanduser("~/.fonts"),
        *(os.path.join(os.path.expanduser(directory), "fonts") for directory in data),
    ]


@cache
def characters(path: Path) -> np.ndarray:
    """The code points that a font file maps to a glyph; of a collection, those of its first font. None where
    the file cannot be read."""
    with suppress(OSError), open(path, "rb") as file:
        return _characters(file)
    return np.empty(0, np.int32)


def _characters(file: BinaryIO) -> np.ndarray:
    """From the table "cmap": https://learn.microsoft.com/typography/opentype/spec/cmap, formats 4 and 12."""
    try:
        start = (
            struct.unpack(">12xI", file.read(16))[0] if file.read(4) == b"ttcf" and not file.seek(0) else 0
        )
        file.seek(start)
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
    """Format 4: ranges of 16-bit code points, with a difference to the glyph's number or the place of a list
    of glyphs."""
    count = struct.unpack_from(">6xH", table)[0] // 2
    words = np.frombuffer(table[: len(table) // 2 * 2], ">u2").astype(np.int64)
    ends, starts, deltas, offsets = (
        words[first : first + count] for first in (7, 8 + count, 8 + 2 * count, 8 + 3 * count)
    )
    if np.maximum(ends - starts + 1, 0).sum() > 1 << 16:
        raise ValueError("ranges overlap")
    found = []
    for n, (start, end, delta, offset) in enumerate(zip(starts, ends, deltas, offsets, strict=True)):
        codes = np.arange(start, min(end, 0xFFFE) + 1)  # 0xFFFF ends the table
        glyphs = (
            (codes + delta) % 65536 if offset == 0 else words[8 + 3 * count + n + offset // 2 + codes - start]
        )
        found.append(codes[glyphs != 0])
    return found


def _groups(table: bytes) -> list[np.ndarray]:
    """Format 12: ranges of code points, with the number of the first one's glyph."""
    (count,) = struct.unpack_from(">12xI", table)
    groups = np.frombuffer(table, ">u4", 3 * count, 16).reshape(-1, 3).astype(np.int64)
    if np.maximum(groups[:, 1] - groups[:, 0] + 1, 0).sum() > 0x110000:
        raise ValueError("ranges overlap, or end after the last code point")
    return [np.arange(start + (glyph == 0), end + 1) for start, end, glyph in groups]
