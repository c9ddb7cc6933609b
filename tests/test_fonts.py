"""The font for a text: the characters of a font file, and the choice among the fonts of the machine."""

import io
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageFont, features

from paligemma.answers import fonts
from paligemma.answers.drawing import draw, unreadable
from paligemma.answers.parsing import Object

OWN = ImageFont.load_default(20).font_bytes  # Pillow's, a real font with Latin letters
GLYPH = 36  # of that font, a letter


@pytest.fixture(autouse=True)
def own_fonts(tmp_path, monkeypatch):
    """A machine whose only fonts are in that directory."""
    monkeypatch.setattr(fonts, "directories", lambda: [str(tmp_path)])
    forget()
    yield
    forget()


def forget() -> None:
    for cached in (fonts.files, fonts.fitting, fonts.characters):
        cached.cache_clear()


Numbers = list[int]


def segments(starts: Numbers, ends: Numbers, deltas: Numbers, offsets: Numbers, glyphs: Numbers) -> bytes:
    """A table of format 4."""
    count = len(starts)
    words = [2 * count, 0, 0, 0, *ends, 0, *starts, *deltas, *offsets, *glyphs]
    return struct.pack(f">3H{len(words)}H", 4, 6 + 2 * len(words), 0, *words)


def groups(*ranges: tuple[int, int, int]) -> bytes:
    """A table of format 12."""
    head = struct.pack(">HHIII", 12, 0, 16 + 12 * len(ranges), 0, len(ranges))
    return head + b"".join(struct.pack(">III", *one) for one in ranges)


def font(table: bytes, platform: int = 3, encoding: int = 10) -> bytes:
    """Pillow's font with another table of characters."""
    data = bytearray(OWN) + bytes(-len(OWN) % 4)
    cmap = struct.pack(">HHHHI", 0, 1, platform, encoding, 12) + table
    (tables,) = struct.unpack_from(">H", data, 4)
    entry = next(at for at in range(12, 12 + 16 * tables, 16) if data[at : at + 4] == b"cmap")
    struct.pack_into(">II", data, entry + 8, len(data), len(cmap))
    return bytes(data) + cmap


def collection(*members: bytes) -> bytes:
    """A .ttc: the fonts one after another, with the offsets of their tables shifted."""
    head, out = struct.pack(">4sHHI", b"ttcf", 1, 0, len(members)), b""
    for member in members:
        data, at = bytearray(member + bytes(-len(member) % 4)), 12 + 4 * len(members) + len(out)
        for entry in range(12, 12 + 16 * struct.unpack_from(">H", data, 4)[0], 16):
            struct.pack_into(">I", data, entry + 8, struct.unpack_from(">I", data, entry + 8)[0] + at)
        head, out = head + struct.pack(">I", at), out + bytes(data)
    return head + out


def drawn(data: bytes, letter: str) -> bytes:
    basic = ImageFont.truetype(io.BytesIO(data), 20, layout_engine=ImageFont.Layout.BASIC)
    return bytes(basic.getmask(letter))


DELTA = (GLYPH - 0x732B) % 65536
TABLES = {
    "differences": segments([0x30, 0x732B, 0xFFFF], [0x39, 0x7330, 0xFFFF], [20, DELTA, 1], [0, 0, 0], []),
    # The offset 4 is in bytes from its own place: the list comes after the offset of 0xFFFF.
    "a list": segments([0x732B, 0xFFFF], [0x732D, 0xFFFF], [0, 1], [4, 0], [GLYPH, 0, GLYPH + 1]),
    "groups": groups(
        (0x41, 0x45, 5), (0x732B, 0x732D, GLYPH), (0x1F431, 0x1F431, GLYPH), (0x1F500, 0x1F502, 0)
    ),
}


@pytest.mark.parametrize("table", [None, *TABLES])
def test_the_characters_of_a_font_are_those_that_freetype_draws(table):
    """FreeType draws them with a glyph that differs from that of a code point which is not a character."""
    data = font(TABLES[table], encoding=10 if table == "groups" else 1) if table else OWN
    none = drawn(data, "\U0010fffe")
    asked = [*range(0x21, 0x500), *range(0x7320, 0x7340), *range(0x1F420, 0x1F440), *range(0x1F4FE, 0x1F506)]
    truth = {code for code in asked if drawn(data, chr(code)) != none}
    assert truth == set(asked) & set(fonts._characters(io.BytesIO(data)).tolist())
    assert len(truth) >= 2


def test_a_collection_is_its_first_font():
    first = font(TABLES["groups"])
    both = collection(first, OWN)
    assert drawn(both, "猫") == drawn(first, "猫")
    found, wanted = (fonts._characters(io.BytesIO(data)).tolist() for data in (both, first))
    assert found == wanted


@pytest.mark.parametrize("size", [0, 3, 13, 40, 300, -5, -30])
def test_a_damaged_file_has_no_characters(tmp_path, size):
    (tmp_path / "broken.ttf").write_bytes(font(TABLES["groups"])[:size])
    assert fonts.characters(tmp_path / "broken.ttf").size == 0
    assert fonts.fitting("猫", 20).missing == "猫"


def test_random_bytes_in_a_table_are_no_crash():
    rng = np.random.default_rng(0)
    for data in (OWN, font(TABLES["differences"], encoding=1), font(TABLES["groups"])):
        start = data.index(b"cmap") if data is OWN else len(data) - 80
        for _ in range(200):
            mutated = bytearray(data)
            for at in rng.integers(start, len(data), 4):
                mutated[at] = rng.integers(256)
            assert fonts._characters(io.BytesIO(bytes(mutated))).size <= 0x110000


def test_a_font_of_the_machine_is_taken_where_pillows_lacks_a_letter(tmp_path):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "cats.ttf").write_bytes(font(TABLES["groups"]))
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    (tmp_path / "readme.txt").write_bytes(b"no font")
    found = fonts.fitting("猫", 20)
    assert (found.missing, found.font.path) == ("", str(tmp_path / "a folder" / "cats.ttf"))
    assert fonts.fitting("cat", 20).font.getname() == ("Aileron", "Regular")
    assert fonts.fitting("cat", 20).missing == ""
    assert fonts.fitting("猫犬", 20).missing == "犬"
    spaced = "猫\u200d \ufe0f"  # a joiner, a space and a variation selector have no glyph of their own
    assert fonts.fitting(spaced, 20).missing == ""


def test_a_plain_font_comes_before_a_bold_one(tmp_path):
    ordered = ["NotoSansCJK-Regular.ttc", "Cats.ttf", "Cats-Bold.ttf", "Dogs-Italic.otf"]
    for name in reversed(ordered):
        (tmp_path / name).write_bytes(font(TABLES["groups"]))
    assert [path.name for path in fonts.files()] == ordered


def test_a_glyph_that_is_blank_is_missing(tmp_path):
    space = next(n for n in range(100) if not any(drawn(font(groups((0x732B, 0x732B, n))), "猫")) and n)
    (tmp_path / "blank.ttf").write_bytes(font(groups((0x732B, 0x732B, space))))
    assert ord("猫") in fonts.characters(tmp_path / "blank.ttf")
    assert fonts.fitting("猫", 20).missing == "猫"


@pytest.mark.parametrize("text", ["कि", "قط"])
def test_a_script_that_changes_its_letters_needs_raqm(tmp_path, monkeypatch, text):
    ranges = ((ord(letter), ord(letter), GLYPH) for letter in sorted(text))
    (tmp_path / "any.ttf").write_bytes(font(groups(*ranges)))
    assert bool(fonts.fitting(text, 20).missing) != (features.check("raqm") and features.check("fribidi"))
    fonts.fitting.cache_clear()
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    assert fonts.fitting(text, 20).missing == "".join(sorted(text))


def thing(label: str) -> Object:
    return Object(label, (40, 60, 160, 160), 0.5, (), None, (200, 200), "")


def test_labels_are_drawn_in_it_and_the_others_are_told(tmp_path):
    labels = ["cat", "猫", "🐱", "猫", "犬"]
    assert unreadable(list(map(thing, labels))) == ["猫", "🐱", "犬"]
    before = np.asarray(draw(Image.new("RGB", (200, 200)), [thing("猫")]))
    forget()
    (tmp_path / "cats.ttf").write_bytes(font(TABLES["groups"]))
    assert unreadable(list(map(thing, labels))) == ["犬"]
    after = np.asarray(draw(Image.new("RGB", (200, 200)), [thing("猫")]))
    assert (before != after).any()


def test_what_needs_no_glyph_is_told_by_unicode():
    assert unicodedata.category("\u200d") == "Cf"
    assert not fonts._is_visible("\u200d")
    assert fonts._is_visible("\u0301")
