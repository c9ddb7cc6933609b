"""Images and prompts become the arrays of transformers, to the bit. Invalid inputs are refused by name."""

import functools
import gc
import io
import json
import os
import random
import re
import struct
import sys
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import conftest
import numpy as np
import pytest
import torch
from checkpoints import config_dict
from conftest import photo
from PIL import Image, ImageFile, PngImagePlugin, features

from paligemma.config import PaliGemmaConfig
from paligemma.errors import PaliGemmaError
from paligemma.fields import shown
from paligemma.processor import Processor, open_image
from paligemma.tokenizer import TextStream, Tokenizer

# A small model with the published vocabulary, in which <0x00> has the id BYTES.
REAL = PaliGemmaConfig.from_dict(config_dict(text={"vocab_size": 257216}, image_token_index=257152))
BYTES = 217
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@functools.cache
def real_model() -> bytes:
    return conftest.data("data/paligemma_tokenizer.model").read_bytes()


@functools.cache
def peer(model: bytes):
    """transformers' processor for a SentencePiece model. It uses Pillow even if torchvision is installed."""
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizer.model").write_bytes(model)
        return PaliGemmaProcessor(peer_images(56), GemmaTokenizer.from_pretrained(directory))


def peer_images(size: int, **settings):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": None, **settings}
    shape = {"height": size, "width": size}
    return SiglipImageProcessorPil(size=shape, image_seq_length=(size // 14) ** 2, **settings)


def peer_pixels(image: Image.Image, size: int = 56, **settings) -> np.ndarray:
    return peer_images(size, **settings)(image, return_tensors="np")["pixel_values"][0]


def fuzzed_prompts(count: int) -> list[str]:
    """Text of every kind, except three kinds that are tokenised differently.

    On purpose a newline at the end (test_newline_at_the_end) and a special token spelled out
    (test_spelled_special_tokens); by SentencePiece a run of more than 31 blanks
    (test_long_blanks_keep_their_length).
    """
    rng = random.Random(0)
    blocks = [
        (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80),
        (0x1E00, 0x2100), (0x2190, 0x2800), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0),
        (0xE000, 0xE100), (0xFE00, 0xFFFF), (0x1F300, 0x1FAFF), (0x20000, 0x2A000), (0, 0x20),
    ]  # fmt: skip
    words = [
        "detect", "segment", "caption", "answer", "en", "what", "is", "the", "color", "of", "this", "cat",
        "dog", ";", "straße", "naïve",
        "Ελλάδα", "мир", "العربية", "हिन्दी", "ไทย", "東京", "한국어", "▁", "\ufffd",
    ]  # fmt: skip
    names = ("table", "tr", "td", "b", "code", "h1", "strong", "br", "notatag")
    tags = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    odd = [
        "<loc12>", "<loc1024>", "<loc 12>", "<seg128>", "<mask>", "<unused3>", "<unused99>", "[toxicity=0]",
        "<start_of_turn>", "[@BOS@]", "<0x41>", "</s>", "<bos", "bos>", "<image",
    ]  # fmt: skip
    code = [
        "def f(x):\n    return x ** 2", '{"a": [1, 2.5e-3]}', "for (int i = 0; i < n; ++i) { a[i] += 1; }",
        "https://a.b/c?d=e&f#g", "$\\frac{1}{2}$",
    ]  # fmt: skip
    emoji = ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "😀", "e\u0301", "\u200b", "\u202e", "\ufeff"]

    def characters_of_one_block() -> str:
        return "".join(chr(rng.randrange(*block)) for block in [rng.choice(blocks)] * rng.randint(1, 12))

    kinds = [
        lambda: rng.choice(words),
        lambda: " ",
        lambda: rng.choice(" \n\t") * rng.randint(1, 31),
        lambda: rng.choice(tags),
        lambda: rng.choice(odd),
        lambda: rng.choice(code),
        lambda: rng.choice(emoji),
        lambda: f"<loc{rng.randrange(1024):04}>" * rng.randint(1, 4),
        lambda: f"<seg{rng.randrange(128):03}>",
        lambda: str(rng.randrange(10 ** rng.randint(1, 20))),
        lambda: "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randint(1, 6))),
        characters_of_one_block,
    ]
    texts = []
    while len(texts) < count:
        text = "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 8)))
        if not re.search(r"[\ud800-\udfff]|\n\Z|<(bos|eos|pad|unk|image)>|([ \n\t▁])\2{31}|[ ▁]{32}", text):
            texts.append(text)
    return texts


@pytest.fixture(scope="module")
def processor(tiny) -> Processor:
    return Processor.load(tiny)


@pytest.fixture(scope="module")
def real() -> Processor:
    return Processor(Tokenizer(real_model(), REAL), REAL, {})


# --- images


def sized(processor: Processor, size: int, preprocessor: dict) -> Processor:
    config = PaliGemmaConfig.from_dict(config_dict(vision={"image_size": size}))
    return Processor(processor.tokenizer, config, preprocessor)


@pytest.mark.parametrize("size", [56, 224])
@pytest.mark.parametrize("shape", [
    (1, 1), (1, 37), (37, 1), (20000, 30), (3, 500), (500, 3), (224, 224), (56, 56), (333, 517), (640, 427),
    (55, 57),
], ids=str)  # fmt: skip
def test_pixels_are_transformers(processor, shape, size):
    """They are equal to the bit, as both resize in Pillow and round in the same order."""
    image = photo(*shape)
    ours = sized(processor, size, {}).arrays("", image)["pixel_values"]
    theirs = peer_pixels(image, size)[None]
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs, strict=True)


def test_every_byte_is_transformers(processor):
    """The image has the model's size, so all 256 values pass unchanged."""
    image = Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3))
    ours = processor.pixels(image)
    np.testing.assert_array_equal(ours, peer_pixels(image), strict=True)
    assert len(np.unique(ours)) == 256
    assert ours.min() == -1
    assert ours.max() == 1


@pytest.mark.parametrize("settings", [
    {"resample": 2}, {"resample": 0}, {"rescale_factor": 0.01}, {"image_mean": [0.48, 0.45, 0.4]},
    {"image_std": [0.26, 0.27, 1]},
], ids=lambda settings: next(iter(settings)))  # fmt: skip
def test_settings_are_followed(processor, settings):
    image = photo(90, 60)
    ours = sized(processor, 56, settings).pixels(image)
    np.testing.assert_array_equal(ours, peer_pixels(image, **settings))
    assert not np.array_equal(ours, processor.pixels(image))


@pytest.mark.parametrize(("name", "value"), [
    ("size", 1 << 80), ("size", 10**400), ("size", 224), ("size", None), ("size", {"shortest_edge": 56}),
    ("size", {"height": 56, "width": 57}), ("size", [56, 56]),
    ("do_resize", False), ("do_resize", None), ("do_rescale", 0), ("do_normalize", "true"),
    ("resample", 1 << 80), ("resample", 6), ("resample", -1), ("resample", True), ("resample", None),
    ("resample", "bicubic"), ("resample", 3.0),
    ("rescale_factor", 1e300), ("rescale_factor", 10**400), ("rescale_factor", 1e-7),
    ("rescale_factor", None), ("rescale_factor", 0), ("rescale_factor", True),
    ("rescale_factor", float("nan")), ("rescale_factor", "1/255"),
    ("image_mean", [1 << 80, 0, 0]), ("image_mean", [0, 0, 10**400]), ("image_mean", [0.5]),
    ("image_mean", 0.5), ("image_mean", None), ("image_mean", [0.5, 0.5, None]),
    ("image_mean", [0.5, 0.5, True]), ("image_mean", "abc"), ("image_mean", [0.5, 0.5, float("inf")]),
    ("image_std", [0.5, 0.5, 1 << 80]), ("image_std", [1e-7, 1, 1]), ("image_std", [-1, 1, 1]),
    ("image_std", [0.5, 0.5, 0]), ("image_std", [0.5] * 4), ("image_std", {}),
])  # fmt: skip
def test_wrong_settings_are_named(processor, name, value):
    with pytest.raises(PaliGemmaError, match=rf"{name} is {re.escape(shown(value))}; it must be"):
        sized(processor, 56, {name: value})


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_settings_are_read_from_the_checkpoint(tiny, tmp_path, tokenizer_model, file):
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    image, settings = photo(90, 60), {"resample": 2, "image_mean": [0.4, 0.5, 0.6]}
    peer_images(56, **settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    if file == "processor_config.json":  # transformers 5
        (tmp_path / "preprocessor_config.json").unlink()
        content = {"image_processor": written, "processor_class": "PaliGemmaProcessor"}
        (tmp_path / file).write_text(json.dumps(content))
    ours = Processor.load(tmp_path)
    np.testing.assert_array_equal(ours.pixels(image), peer_pixels(image, **settings))
    if file == "processor_config.json":
        (tmp_path / file).write_text('{"image_processor": null}')
        Processor.load(tmp_path)  # null has no settings, and is accepted
        (tmp_path / file).write_text('{"image_processor": 5}')
        with pytest.raises(PaliGemmaError, match="image_processor is 5"):
            Processor.load(tmp_path)


def bands(mode: str, *pixels) -> Image.Image:
    """One row of pixels, built from bands, so that Pillow converts no value."""
    images = [Image.frombytes("L", (len(pixels), 1), bytes(band)) for band in zip(*pixels, strict=True)]
    return Image.merge(mode, images)


def palette(mode: str, *indices) -> Image.Image:
    if mode == "P":
        image = Image.frombytes("P", (len(indices), 1), bytes(indices))
    else:
        image = bands("PA", *((i, 60 * i) for i in indices))
    image.putpalette([value for colour in (RED, GREEN, BLUE, WHITE) for value in colour])
    return image


def with_info(image: Image.Image, **info) -> Image.Image:
    image.info.update(info)
    return image


def deep(mode: str, dtype: str, values) -> Image.Image:
    return Image.frombytes(mode, (len(values), 1), np.asarray(values).astype(dtype).tobytes())


GREYS = [0, 1, 77, 128, 254, 255]
GREY = [(v, v, v) for v in GREYS]
RAMP = [0, 255, 256, 20000, 32768, 65279, 65535]  # 16-bit values; the 8-bit value is the high byte
HIGH = [(v >> 8,) * 3 for v in RAMP]
NATIVE = "<" if sys.byteorder == "little" else ">"
FOUR = (RED, GREEN, BLUE, WHITE, RED)  # the colours of the indices 0, 1, 2, 3, 0
WITH_ALPHA, OPAQUE = [(*RED, 0), (1, 2, 3, 128), (250, 128, 9, 255)], [RED, (1, 2, 3), (250, 128, 9)]
MODES = {  # name -> (image, its colours, tolerance)
    "1": (Image.frombytes("1", (3, 1), b"\xa0"), [WHITE, BLACK, WHITE], 0),
    "L": (bands("L", *((v,) for v in GREYS)), GREY, 0),
    "L, a transparent grey": (with_info(bands("L", *((v,) for v in GREYS)), transparency=77), GREY, 0),
    "LA": (bands("LA", *((v, 255 - v) for v in GREYS)), GREY, 0),
    # The colours of La and RGBa are v * 255 / a, rounded.
    "La": (bands("La", (50, 100), (100, 100), (30, 255), (128, 255)),
           [(v, v, v) for v in (127, 255, 30, 128)], 1),
    "P": (palette("P", 0, 1, 2, 3, 0), FOUR, 0),
    "P, a transparent index": (with_info(palette("P", 0, 1, 2, 3, 0), transparency=1), FOUR, 0),
    "P, transparencies": (with_info(palette("P", 0, 1, 2, 3, 0), transparency=b"\0\x80\xff\0"), FOUR, 0),
    "PA": (palette("PA", 0, 1, 2, 3, 0), FOUR, 0),
    "RGB": (bands("RGB", *OPAQUE), OPAQUE, 0),
    "RGBA": (bands("RGBA", *WITH_ALPHA), OPAQUE, 0),
    "RGBX": (bands("RGBX", *WITH_ALPHA), OPAQUE, 0),
    "RGBa": (bands("RGBa", (100, 0, 50, 100), (50, 100, 10, 200), (9, 8, 7, 255)),
             [(255, 0, 127), (64, 127, 13), (9, 8, 7)], 1),
    "CMYK": (bands("CMYK", (0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255), (0,) * 4),
             [RED, GREEN, BLUE, BLACK, WHITE], 0),
    # The first three are the primaries by JFIF's formula, rounded: half a step of Cr is 0.9 of blue.
    "YCbCr": (bands("YCbCr", (76, 85, 255), (150, 44, 21), (29, 255, 107), (100, 128, 128)),
              [RED, GREEN, BLUE, (100, 100, 100)], 2),
    # CIE 15 with sRGB's primaries under D50, as L * 2.55 and a, b + 128: half a step of a or b changes a
    # channel by up to 3.
    "LAB": (bands("LAB", (138, 166, 174), (142, 89, 151), (96, 148, 72), (128, 128, 128), (255, 128, 128)),
            [(200, 100, 50), (60, 150, 90), (70, 80, 180), (119, 119, 119), WHITE], 3),
    "HSV": (bands("HSV", (0, 255, 255), (85, 255, 255), (170, 255, 255), (33, 0, 77), (9, 200, 0)),
            [RED, GREEN, BLUE, (77, 77, 77), BLACK], 0),
    "I": (deep("I", "=i4", GREYS), GREY, 0),
    "I, 16 bits": (deep("I", "=i4", RAMP), HIGH, 0),
    "F": (deep("F", "=f4", [0, 0.4, 77, 127.6, 255]), [(v, v, v) for v in (0, 0, 77, 128, 255)], 0),
    "F, to 1": (deep("F", "=f4", [0, 1 / 255, 0.5, 0.999, 1]), [(v, v, v) for v in (0, 1, 128, 255, 255)], 0),
    "F, to 65535": (deep("F", "=f4", RAMP), HIGH, 0),
    "I;16": (deep("I;16", "<u2", RAMP), HIGH, 0),
    "I;16, dark": (deep("I;16", "<u2", [0, 100, 255]), [BLACK] * 3, 0),
    "I;16L": (deep("I;16L", "<u2", RAMP), HIGH, 0),
    "I;16B": (deep("I;16B", ">u2", RAMP), HIGH, 0),
    "I;16N": (deep("I;16N", f"{NATIVE}u2", RAMP), HIGH, 0),
}  # fmt: skip


def check(image: Image.Image, colours, tolerance: int) -> None:
    assert image.mode == "RGB"
    expected = np.asarray(colours).reshape(image.height, image.width, 3)
    np.testing.assert_allclose(np.asarray(image).astype(int), expected, atol=tolerance, rtol=0)


def test_no_mode_is_left_out():
    more = {"LA", "La", "PA", "RGBX", "RGBa", "I;16", "I;16L", "I;16B", "I;16N"}
    assert {*Image.MODES} | more <= {name.split(",")[0] for name in MODES}


@pytest.mark.parametrize("name", MODES)
def test_modes(name, recwarn):
    image, colours, tolerance = MODES[name]
    check(open_image(image), [colours], tolerance)
    on_its_side = image.copy()
    on_its_side.getexif()[0x0112] = 8  # the row's left end is the picture's bottom
    check(open_image(on_its_side), [[colour] for colour in colours[::-1]], tolerance)
    assert not recwarn.list


EXACT = {  # the options with which a format keeps the pixels, except for rounding in YCbCr
    "jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True, "exact": True},
}  # fmt: skip
KEPT = {  # the modes that a format can store
    "png": ["1", "L", "L, a transparent grey", "LA", "P", "P, a transparent index", "P, transparencies",
            "RGB", "RGBA", "I;16", "I;16, dark"],
    "tiff": ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I, 16 bits", "F",
             "F, to 1", "I;16", "I;16B", "I;16, dark"],
    "gif": ["1", "L", "P", "P, a transparent index"],
    "bmp": ["1", "L", "P", "RGB", "RGBA"],
    "webp": ["L", "RGB", "RGBA", "P", "LA"],
    "jpg": ["L", "RGB", "CMYK"],
}  # fmt: skip


@pytest.mark.parametrize(("file", "names"), KEPT.items())
def test_files(tmp_path, file, names, recwarn):
    for name in names:
        image, colours, tolerance = MODES[name]
        if file == "jpg":  # each pixel becomes a flat block, whose colour a JPEG file keeps
            image = image.resize((16 * image.width, 16), Image.Resampling.NEAREST)
            colours, tolerance = [np.repeat(colours, 16, axis=0)] * 16, 2
        path = tmp_path / f"{name}.{file}"
        image.save(path, **EXACT.get(file, {}))
        check(open_image(path), colours, tolerance)
    assert not recwarn.list


@pytest.mark.parametrize("values", [[0, float("nan")], [-1, 1], [0, 70000], [0, float("inf")]], ids=str)
def test_grey_in_an_unknown_range_is_refused(values):
    with pytest.raises(PaliGemmaError, match=r"grey goes from .* to .*scale it"):
        open_image(deep("F", "=f4", values))
    with pytest.raises(PaliGemmaError, match="grey goes from"):
        open_image(deep("I", "=i4", [-1, 2**31 - 1]))


# EXIF 2.32, tag 0x0112: the picture's side at the stored 0th row, and that at the stored 0th column.
STORED = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.transpose(1, 0, 2),  # left, top
    6: lambda a: a[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda a: a[::-1].transpose(1, 0, 2),  # left, bottom
}


BLOCKS = np.array([[RED, GREEN, BLUE], [WHITE, BLACK, (200, 100, 0)]], np.uint8)
PICTURE = np.kron(BLOCKS, np.ones((16, 16, 1), np.uint8))
FORMATS = {  # the formats that store an orientation, and the options with which they keep the pixels
    "jpeg": {"quality": 100, "subsampling": 0}, "mpo": {"quality": 100, "subsampling": 0}, "png": {},
    "webp": {"lossless": True}, "tiff": {},
    **({"avif": {"quality": 100, "subsampling": "4:4:4"}} if features.check("avif") else {}),
}  # fmt: skip


def turned(orientation: int) -> Image.Image:
    """PICTURE as a camera stores it that is held in this orientation."""
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](PICTURE)))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp_of(orientation: int, attribute: bool) -> bytes:
    description = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
    if attribute:
        description = f' tiff:Orientation="{orientation}"/>'
    rdf = 'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    tiff = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'
    content = f"<rdf:RDF {rdf} {tiff}><rdf:Description{description}</rdf:RDF>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{content}</x:xmpmeta>'.encode()


def stored_with(image: Image.Image, file: str, carrier: str, orientation: int) -> bytes:
    """The file with its orientation in EXIF, in XMP (two spellings), or as ImageMagick stores EXIF in PNG."""
    options, xmp = dict(FORMATS[file]), xmp_of(orientation, attribute=carrier == "xmp attribute")
    if carrier == "exif":
        options["exif"] = exif_of(orientation)
    elif file == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        if carrier == "raw profile":
            data = exif_of(orientation).tobytes()
            text = f"\nexif\n{len(data):8}\n{data.hex()}\n"
            options["pnginfo"].add_text("Raw profile type exif", text, zip=True)
        else:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif file == "tiff":
        options["tiffinfo"] = {700: xmp}
    else:
        options["xmp"] = xmp
    out = io.BytesIO()
    image.save(out, file, **options)
    return out.getvalue()


CARRIERS = [
    *((file, "exif") for file in FORMATS), ("png", "raw profile"),
    *((file, f"xmp {kind}") for file in FORMATS for kind in ("attribute", "element") if file != "mpo"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "carrier"), CARRIERS)
def test_orientation_is_applied_once(tmp_path, processor, file, carrier):
    for orientation in STORED:
        data = stored_with(turned(orientation), file, carrier, orientation)
        path = tmp_path / f"a.{file}"
        path.write_bytes(data)
        theirs = Image.open(io.BytesIO(data))
        for source in (data, path, theirs, theirs):
            once = open_image(source)
            check(once, PICTURE, 2)  # 2: rounding in YCbCr
            again, saved = open_image(once), io.BytesIO()
            once.save(saved, "png")  # as --draw does
            for other in (again, open_image(again), open_image(saved.getvalue())):
                np.testing.assert_array_equal(np.asarray(other), np.asarray(once))
            ours, read = (processor.arrays("", image)["pixel_values"] for image in (once, data))
            np.testing.assert_array_equal(ours, read)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_orientation_of_an_image_in_memory(mode):
    for orientation in STORED:
        image = turned(orientation).quantize(8) if mode == "P" else turned(orientation).convert(mode)
        converted = np.asarray(Image.fromarray(PICTURE).convert(mode).convert("RGB"))
        colours = PICTURE if mode == "P" else converted
        info = {"exif": exif_of(orientation).tobytes(), "xmp": xmp_of(orientation, attribute=True)}
        for carrier in ("getexif", "exif", "xmp"):
            if carrier == "getexif":
                image.getexif()[0x0112] = orientation
            else:
                image = image.copy()
                image.info = {carrier: info[carrier]}
            before = image.info.copy(), image.tobytes(), image.size
            once = open_image(image)
            check(once, colours, 0)
            check(open_image(once), colours, 0)
            check(open_image(image), colours, 0)
            assert (image.info, image.tobytes(), image.size) == before, "the caller's image changed"
            assert image.getexif()[0x0112] == orientation


def test_the_callers_orientation_of_an_image_wins_once_and_twice():
    image = turned(6).convert("RGBA")
    image.info["exif"] = exif_of(6).tobytes()
    image.getexif()[0x0112] = 1
    once = open_image(image)
    check(once, np.asarray(turned(6)), 0)
    check(open_image(once), np.asarray(turned(6)), 0)


@pytest.mark.parametrize("exif", [b"garbage", b"MM\0*\0\0\0\x08\0\x05", b"", b"MM\0*\0\0"], ids=repr)
@pytest.mark.parametrize("file", ["jpeg", "png", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's warning, for the caller to filter
def test_unreadable_exif_is_no_obstacle(file, exif):
    exif = b"Exif\0\0" + exif
    stored = io.BytesIO()
    Image.new("RGB", (8, 4), RED).save(stored, file, exif=exif)
    assert open_image(stored.getvalue()).size == (8, 4)


def test_orientation_beside_exif_that_cannot_be_written():
    image = Image.new("RGB", (8, 4))
    entries = struct.pack(">HHIHHHHIHH", 0x0112, 3, 1, 6, 0, 0x0100, 2, 1, 0x4100, 0)  # the width is "A"
    image.info["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entries + bytes(4)
    assert open_image(image).size == (4, 8)


@pytest.mark.parametrize("file", ["gif", "webp", "png"])
def test_animation_is_its_first_frame(tmp_path, file):
    path, options = tmp_path / f"a.{file}", {"lossless": True} if file == "webp" else {}
    first, second = (Image.new("RGB", (9, 5), colour) for colour in (RED, BLUE))
    first.save(path, save_all=True, append_images=[second], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(open_image(path), [[RED] * 9] * 5, 0)
        gc.collect()
    assert not caught  # the file is closed


def test_sources_are_equal(tmp_path):
    path, image = tmp_path / "a.png", photo(40, 30)
    image.save(path)
    lazy, stream = Image.open(path), io.BytesIO(path.read_bytes())
    with path.open("rb") as file:
        data = path.read_bytes()
        sources = [path, str(path), PurePath(path), data, bytearray(data), memoryview(data), stream, file]
        sources += [image, lazy, np.asarray(image), np.asfortranarray(image), np.array(image)[::-1][::-1]]
        for source in sources:
            np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))
        assert not file.closed
    assert not stream.closed
    assert image == photo(40, 30)
    assert lazy.tobytes() == image.tobytes()
    grey = np.asarray(image)[..., 0]
    check(open_image(grey), np.stack([grey] * 3, axis=-1), 0)


RGB = np.asarray(photo(7, 5))
RGBA = np.concatenate([RGB, np.full((5, 7, 1), 9, np.uint8)], axis=2)
UNIT = (RGB / 255).astype(np.float32)
GREY_RGB, BITS = np.stack([RGB[..., 0]] * 3, axis=-1), RGB[..., 0] > 128
ROUNDED = [[0, 0.49 / 255, 0.51 / 255, 1]]
ARRAYS = {  # name -> (the array, its RGB values)
    "uint8, read-only": (np.frombuffer(RGB.tobytes(), np.uint8).reshape(RGB.shape), RGB),
    "(H, W)": (RGB[..., 0], GREY_RGB),
    "(H, W, 1)": (RGB[..., :1], GREY_RGB),
    "(H, W, 4)": (RGBA, RGB),
    "(3, H, W)": (RGB.transpose(2, 0, 1), RGB),
    "(4, H, W)": (RGBA.transpose(2, 0, 1), RGB),
    "(1, H, W)": (RGB[None, ..., 0], GREY_RGB),
    "(3, W, 3), the last axis": (RGB[:3], RGB[:3]),
    "float32": (UNIT, RGB),
    "float64": (RGB / 255, RGB),
    "float32, rounded": (np.array(ROUNDED, np.float32), [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]),
    "float32 (3, H, W)": (UNIT.transpose(2, 0, 1), RGB),
    "bool": (BITS, np.stack([np.where(BITS, 255, 0)] * 3, axis=-1)),
    "tensor (3, H, W)": (torch.from_numpy(RGB.transpose(2, 0, 1).copy()), RGB),
    "tensor (H, W, 3)": (torch.from_numpy(RGB.copy()), RGB),
    "tensor (4, H, W)": (torch.from_numpy(RGBA.transpose(2, 0, 1).copy()), RGB),
    "tensor (H, W)": (torch.from_numpy(RGB[..., 0].copy()), GREY_RGB),
    "tensor, float32": (torch.from_numpy(UNIT.transpose(2, 0, 1).copy()).requires_grad_(), RGB),
    "tensor, bfloat16": (torch.tensor([[0.0, 0.25, 1.0]]).bfloat16(), [[[0] * 3, [64] * 3, [255] * 3]]),
    "tensor, bool": (torch.tensor([[True, False]]), [[[255] * 3, [0] * 3]]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name, recwarn):
    given, colours = ARRAYS[name]
    check(open_image(given), colours, 0)
    assert not recwarn.list


@pytest.mark.parametrize("array", [
    np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.int64), np.zeros((2, 4, 5), np.uint8),
    np.zeros((2, 3, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((1, 4, 4, 3), np.uint8),
    np.zeros((4, 4), object), np.zeros((), np.uint8), np.zeros((4, 4), complex), np.zeros((4, 4), "U1"),
    torch.zeros(3, 4, 4), torch.zeros(4, 9, 3, dtype=torch.uint8), torch.zeros(1, 3, 9, 9),
    torch.zeros(9, 9, dtype=torch.int64),
], ids=lambda array: f"{array.dtype} {tuple(array.shape)}")  # fmt: skip
def test_wrong_arrays_are_named(array):
    kind = "a tensor" if isinstance(array, torch.Tensor) else "an array"
    message = f"{kind} of {array.dtype} {tuple(array.shape)}; it must be uint8"
    with pytest.raises(PaliGemmaError, match=re.escape(message)):
        open_image(array)


@pytest.mark.parametrize("values", [[0, 1.001], [-0.01, 0], [0.0, 255], [0, np.nan], [0, np.inf]], ids=str)
def test_floating_point_beyond_1_is_refused(values):
    for array in (np.array([values]), torch.tensor([values])):
        with pytest.raises(PaliGemmaError, match=r"with values from .* must be from 0 to 1"):
            open_image(array)


@pytest.mark.parametrize("source", [None, 3, [1], {}, ("a.png",)], ids=lambda source: type(source).__name__)
def test_wrong_sources_are_named(source):
    with pytest.raises(PaliGemmaError, match=f"the image is a {type(source).__name__}; it must be"):
        open_image(source)


def test_no_pixels():
    for image in (Image.new("RGB", (0, 4)), Image.new("L", (4, 0)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(PaliGemmaError, match=r"no pixels|cannot be read"):
            open_image(image)


def stored(file: str) -> bytes:
    out = io.BytesIO()
    photo(60, 40).save(out, file)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file", ["jpeg", "png", "webp", "gif", "tiff", "bmp"])
@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_truncated_files_are_refused(tmp_path, file, kept):
    data = stored(file)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(PaliGemmaError, match=re.escape(str(path))):
        open_image(path)
    with path.open("rb") as lazy, pytest.raises(PaliGemmaError, match="the image"):
        open_image(lazy)


def test_no_image(tmp_path):
    text, empty = tmp_path / "a.jpg", tmp_path / "empty.png"
    text.write_text("This is not an image.\n" * 99)
    empty.touch()
    for source, problem in (
        (text, f"{text} is not in an image format"),
        (empty, f"{empty} is empty: it has 0 bytes"),
        (b"", "the image is empty: it has 0 bytes"),
        (io.BytesIO(), "the image is empty: it has 0 bytes"),
        (bytearray(b"x"), "the image is not in an image format"),
        (os.devnull, f"{os.devnull} is not in an image format"),
        (tmp_path / "none.png", "none.png: there is no such file"),
        (tmp_path, f"{tmp_path}: it cannot be read as an image: Is a directory"),
        ("a\nb", r"'a\nb': there is no such file"),
        ("a\0b", "cannot be read"),
        (io.StringIO("text"), "cannot be read"),
    ):
        with pytest.raises(PaliGemmaError, match=re.escape(problem)) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "problem"), [
    ("https://example.org/cat.jpg", "https://example.org/cat.jpg is a URL, and only files are read: "
                                    "download it, and give the path or the bytes"),
    ("file:///tmp/cat.jpg", "is a URL"),
    ("S3://bucket/cat.jpg", "is a URL"),
    ("data:image/png;base64,aGVsbG8=",
     "is a data URL, and only files are read: decode it, and give the path or the bytes"),
    ("data:image/png;base64," + "A" * 50000, "is a data URL"),
    ("A" * 50000, "(50,000 characters): it cannot be read as an image: File name too long"),
    ("https://example.org/" + "a" * 4000, "(4,020 characters) is a URL"),
], ids=lambda value: value[:20])  # fmt: skip
def test_text_that_is_not_a_path(source, problem):
    with pytest.raises(PaliGemmaError, match=re.escape(problem)) as caught:
        open_image(source)
    assert len(str(caught.value)) < 300


READ = ["jpeg", "png", "webp", "gif", "tiff", "bmp", *(["avif"] if features.check("avif") else [])]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file", READ)
def test_damaged_files_raise_no_other_error(file):
    rng, data = np.random.default_rng(0), stored(file)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for i in rng.integers(0, min(len(data), rng.choice([60, 400, len(data)])), rng.integers(1, 6)):
            damaged[i] = rng.integers(256)
        try:
            open_image(bytes(damaged))
        except PaliGemmaError:
            refused += 1
    assert refused > 10


def test_formats_that_are_not_asked_for_are_refused():
    with pytest.raises(PaliGemmaError, match=r"format that is taken \(JPEG\): convert it"):
        open_image(stored("png"), formats=("JPEG", "NONE"))
    assert open_image(stored("png"), formats=("JPEG", "PNG")).size == open_image(stored("png")).size


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, recwarn):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    path, data = tmp_path / "bomb.png", zlib.compress(bytes(9000))
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("unpacked"))
    limit = "more than 178,956,970 pixels, Pillow's limit .* raise PIL.Image.MAX_IMAGE_PIXELS where you trust"
    for source in (path, path.read_bytes()):
        with pytest.raises(PaliGemmaError, match=limit):
            open_image(source)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limit_of_pixels(monkeypatch):
    """Pillow itself warns from MAX_IMAGE_PIXELS on; twice as many are refused."""
    png = io.BytesIO()
    photo(20, 10).save(png, "png")
    lazy = Image.open(png)
    for limit, accepted in ((200, True), (199, True), (100, True), (99, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for source in (png.getvalue(), lazy, photo(20, 10), np.asarray(photo(20, 10))):
            if accepted:
                assert open_image(source).size == (20, 10)
            else:
                with pytest.raises(PaliGemmaError, match="more than 198 pixels"):
                    open_image(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(lazy).size == (20, 10)


def test_warnings_that_the_caller_turns_into_errors_are_refusals(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # the image has 2400
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PaliGemmaError, match="more than 2,000 pixels"):
            open_image(stored("png"))


# --- what a call does not change


class Watched(io.BytesIO):
    """A file that records the warning filters at each read."""

    def read(self, *size):
        filters = id(warnings.filters), tuple(map(str, warnings.filters))
        seen.add((*filters, warnings.showwarning, warnings._showwarnmsg_impl))
        return super().read(*size)


seen: set = set()


def test_warning_filters_are_never_touched():
    seen.clear()
    Watched(b"").read()
    (before,) = seen
    for file in ("jpeg", "png", "tiff", "gif"):
        open_image(Watched(stored(file)))
    assert seen == {before}


def test_threads():
    """Threads, as in a server, read the same pixels, and the warning filters of the process stay the same."""
    kinds = [(file, orientation) for orientation in (1, 6) for file in ("png", "jpeg")]
    data = [stored_with(turned(orientation), file, "exif", orientation) for file, orientation in kinds]
    data.append(b"not an image")
    before = warnings.filters, list(warnings.filters)

    def work(n: int) -> None:
        for source in (data[n:] + data[:n]) * 8:
            try:
                check(open_image(source), PICTURE, 2)
            except PaliGemmaError:
                assert source == data[-1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [n % len(data) for n in range(16)]))
    assert warnings.filters is before[0]
    assert warnings.filters == before[1]


# --- prompts


def blank_images(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (1, 1))] * count


def theirs(processor, prompts: list[str], **more) -> dict[str, np.ndarray]:
    images = blank_images(len(prompts))
    return processor(text=prompts, images=images, padding=True, return_tensors="np", **more)


def test_prompts_are_transformers(real):
    prompts = ["", "a", "describe this image", "detect cat ; dog", "caption en", *fuzzed_prompts(3000)]
    before = [real.tokenizer.encode(prompt) for prompt in prompts]
    for i in range(0, len(prompts), 50):  # the rows have many lengths, which compares the padding too
        some = prompts[i : i + 50]
        ours, wanted = real.arrays(some, blank_images(len(some))), theirs(peer(real_model()), some)
        for name in ("input_ids", "attention_mask", "pixel_values"):
            np.testing.assert_array_equal(ours[name], wanted[name], strict=True, err_msg=name)
    assert ours["attention_mask"].min() == 0
    assert [real.tokenizer.encode(prompt) for prompt in prompts] == before, "calls changed the tokenizer"
    assert real.tokenizer.encode("<loc0000><loc1023><seg000><seg127>") == [256000, 257023, 257024, 257151]


def test_suffix_is_transformers(real):
    prompts = ["detect cat", "a", "", "caption en", "x"]
    suffixes = ["<loc0001><loc0002> cat", "an answer of more words", "yes", "\n", ""]
    wanted = theirs(peer(real_model()), prompts, suffix=suffixes)
    assert (wanted["input_ids"][:, -1] == 1).all()  # training appends <eos>, which the model has to generate
    ours = real.arrays(prompts, blank_images(len(prompts)), suffixes)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        np.testing.assert_array_equal(ours[name], wanted[name][:, :-1], strict=True, err_msg=name)
    assert ours["token_type_ids"].sum() > 8
    one = real.arrays("detect cat", photo(9, 9), "<loc0001><loc0002> cat")
    assert one["token_type_ids"].tolist() == [[0] * 20 + [1] * 3]


@pytest.mark.parametrize("prompt", ["a\n", "a\n\n", "\n", "a \n"])
def test_newline_at_the_end(real, prompt):
    """As in training, prompt and separator are tokenised separately; transformers merges them to `\\n\\n`."""
    ids = real.arrays(prompt, photo(9, 9))["input_ids"][0].tolist()
    assert ids == [257152] * 16 + [2] + real.tokenizer.encode(prompt) + [108]
    assert theirs(peer(real_model()), [prompt])["input_ids"][0].tolist() != ids
    if prompt == "a\n":
        assert ids[-3:] == [235250, 108, 108]


@pytest.mark.parametrize("word", ["<bos>", "<eos>", "<pad>", "<unk>", "<image>"])
def test_spelled_special_tokens(real, processor, word):
    for p, newline in ((real, 108), (processor, processor.tokenizer.encode("\n")[0])):
        for prompt in (word, f"a{word}b", f"{word * 3} x", f" {word}"):
            ids = p.arrays(prompt, photo(9, 9), prompt)["input_ids"][0].tolist()
            text = ids[17:]
            assert ids[:17] == [p.config.image_token_index] * 16 + [2]
            assert not {0, 1, 2, 3, p.config.image_token_index} & set(text)
            assert p.tokenizer.decode(text) == f"{prompt}\n{prompt}"
            assert newline in text


def test_long_blanks_keep_their_length(real):
    """SentencePiece takes the longest run first, 31 + 9 blanks; transformers merges by rank, 16 + 24."""
    ids = real.tokenizer.encode(" " * 40)
    assert [len(real.tokenizer.decode([i])) for i in ids] == [31, 9]
    assert real.tokenizer.decode(ids) == " " * 40


def test_long_prompt_is_refused_with_the_limit(tokenizer_model):
    config = PaliGemmaConfig.from_dict(config_dict(text={"max_position_embeddings": 40}))
    processor = Processor(Tokenizer(tokenizer_model, config), config, {})
    locs = "<loc0000>" * 22  # 24 tokens with <bos> and newline, 40 with the image
    assert processor.arrays(locs, photo(9, 9))["input_ids"].shape == (1, 40)
    message = "the prompt is 25 tokens; with 16 for the image, this model takes at most 24"
    with pytest.raises(PaliGemmaError, match=message):
        processor.arrays(locs + "<loc0000>", photo(9, 9))
    with pytest.raises(PaliGemmaError, match="at most 24"):
        processor.arrays(["a", locs], [photo(9, 9)] * 2, ["a", "<loc0000>"])


@pytest.mark.parametrize("prompt", ["\ud800", "caption \udcff", None, 3, b"caption", ["a"]], ids=ascii)
def test_prompt_that_is_not_text(processor, prompt):
    with pytest.raises(PaliGemmaError, match="is not Unicode text"):
        processor.arrays([prompt], [photo(9, 9)])
    with pytest.raises(PaliGemmaError, match="is not Unicode text"):
        processor.arrays(["a"], [photo(9, 9)], [prompt])


@pytest.mark.parametrize(("text", "images", "suffix", "message"), [
    (["a", "b"], 1, None, "2 prompts and 1 image: there must be one image for each prompt"),
    ("a", 2, None, "1 prompt and 2 images: there must be one image for each prompt"),
    ("ab", 2, None, "1 prompt and 2 images"),
    ([], 0, None, "there is no prompt and no image"),
    (["a"], 0, None, "1 prompt and 0 images"),
    ([], 1, None, "0 prompts and 1 image:"),
    (["a"], 1, ["x", "y"], "1 prompt and 2 suffixes: there must be one suffix for each prompt"),
    (["a", "b"], 2, "x", "2 prompts and 1 suffix: there"),
])  # fmt: skip
def test_lists_of_other_lengths(processor, text, images, suffix, message):
    with pytest.raises(PaliGemmaError, match=f"^{message}"):
        processor.arrays(text, [photo(9, 9)] * images, suffix)


def test_a_call_returns_tensors(processor):
    text, images, suffix = ["a", "what is this"], [photo(9, 9), photo(20, 8, seed=1)], ["b", "c"]
    inputs = processor(text=text, images=images, suffix=suffix)
    arrays = processor.arrays(text, images, suffix)
    assert inputs.keys() == {"input_ids", "attention_mask", "pixel_values", "token_type_ids"}
    for name, value in inputs.items():
        assert value.dtype == (torch.float32 if name == "pixel_values" else torch.int64)
        np.testing.assert_array_equal(value.numpy(), arrays[name])
    assert not np.array_equal(arrays["pixel_values"][0], arrays["pixel_values"][1])
    assert list(processor("a", photo(9, 9))) == ["input_ids", "attention_mask", "pixel_values"]


# --- answers


def test_decode_is_transformers(real):
    rng, tokenizer = np.random.default_rng(0), peer(real_model()).tokenizer
    # The ids of bytes are left out; test_decode_inverts_encode decodes them.
    text = np.array([i for i in range(257152) if not BYTES <= i < BYTES + 256])
    for _ in range(300):
        ids = np.concatenate([rng.choice(text, 30), [0, 1, 2, 3, 4, 257152]])
        rng.shuffle(ids)
        for skip in (True, False):
            wanted = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert real.tokenizer.decode(ids, skip_special_tokens=skip) == wanted


def test_decode_inverts_encode(real, processor):
    for text in fuzzed_prompts(1500):
        for tokenizer in (real.tokenizer, processor.tokenizer):
            decoded = tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False)
            assert decoded == text.replace("▁", " ")


def test_decode_special_and_unused_ids(real):
    ids = [257152, 2, 4521, 0, 3, 257153, 10**9, -1, 1]
    word = real.tokenizer.decode([4521])
    assert real.tokenizer.decode(ids) == word
    spelled = f"<image><bos>{word}<pad><unk><257153><1000000000><-1><eos>"
    assert real.tokenizer.decode(ids, skip_special_tokens=False) == spelled
    euro = [BYTES + b for b in "€".encode()]
    assert real.tokenizer.decode([euro[0], 1, *euro[1:]]) == "€"
    assert real.tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", [
    list, tuple, iter, np.array, torch.tensor, lambda ids: np.array(ids, np.int32),
    lambda ids: [torch.tensor(i) for i in ids],
])  # fmt: skip
def test_decode_takes_ids_of_any_kind(real, kind):
    assert real.tokenizer.decode(kind([4521, 235248, 256001])) == real.tokenizer.decode([4521]) + " <loc0001>"


@pytest.mark.parametrize("which", ["real", "processor"])
def test_stream_is_decode(which, request):
    tokenizer, rng = request.getfixturevalue(which).tokenizer, np.random.default_rng(0)
    first = tokenizer.pieces.piece_to_id("<0x00>")
    whole = [[first + b for b in character.encode()] for character in "é€漢😀�"]
    for _ in range(200):
        ids = []
        while len(ids) < 40:
            ids += [
                lambda: rng.integers(0, tokenizer.image_token_id + 3, 2).tolist(),
                lambda: whole[rng.integers(len(whole))],
                lambda: (first + rng.integers(128, 256, 3)).tolist(),  # not UTF-8
                lambda: [tokenizer.eos_token_ids[0]],
            ][rng.integers(4)]()
        stream, shown = TextStream(tokenizer), ""
        for n, token in enumerate(ids, 1):
            shown += stream.push(token)
            sofar = tokenizer.decode(ids[:n])
            assert stream.text == sofar
            assert sofar.startswith(shown)
            assert shown == sofar or sofar.endswith("\ufffd")  # only a part of a character is held back
        everything = tokenizer.decode(ids)
        assert shown + stream.finish() == everything  # no shown � became a character with later bytes
        assert stream.finish() == ""
        assert stream.text == everything


def test_stream_holds_back_a_part_of_a_character(real):
    stream = TextStream(real.tokenizer)
    pushed = [stream.push(BYTES + b) for b in "a€".encode()]
    assert pushed == ["a", "", "", "€"]
    assert stream.push(BYTES + 0xE2) == ""
    assert stream.text.endswith("\ufffd")
    assert stream.push(256000) == "\ufffd<loc0000>"


def test_stream_costs_the_same_for_each_token(processor, monkeypatch):
    decoded, decode = [], processor.tokenizer.decode
    monkeypatch.setattr(processor.tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stream = TextStream(processor.tokenizer)
    for token in processor.tokenizer.encode("the cat is left of the dog " * 50):
        stream.push(token)
    assert max(decoded) == 1
