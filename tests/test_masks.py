"""The mask decoder: NumPy and torch beside the published formula, reimplemented here; its file and the file's
download; masks as files."""

import contextlib
import io
import json
import os
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import masks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import assert_one_line, run
from PIL import Image, ImageDraw

from paligemma import PaliGemmaError, generate
from paligemma.answers import mask_weights
from paligemma.answers.masks import MaskDecoder
from paligemma.answers.parsing import parse
from paligemma.model import PaliGemma
from paligemma.processor import Processor
from paligemma.reference import mask_decoder as reference


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return masks.random_weights() | masks.encoder_weights()


@pytest.fixture(scope="module")
def npz(tmp_path_factory, weights):
    return masks.write_npz(tmp_path_factory.mktemp("masks") / "vae-oid.npz", weights)


def published(codes: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """Flax's operations, which big_vision uses. A transposed convolution inserts zeros between the values of
    its input, pads it by 2, and convolves it with the kernel flipped in both axes."""
    t = {name: torch.from_numpy(array).double() for name, array in w.items()}

    def conv(x, name, padding=0):
        return F.conv2d(x, t[f"{name}.weight"], t[f"{name}.bias"], padding=padding)

    x = t["_vq_vae._embedding"][torch.from_numpy(codes)].reshape(-1, 4, 4, masks.E).permute(0, 3, 1, 2)
    x = conv(x, "decoder.0").relu()
    for block in ("decoder.2.net", "decoder.3.net"):
        x = x + conv(conv(conv(x, f"{block}.0", 1).relu(), f"{block}.2", 1).relu(), f"{block}.4")
    for name in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
        spread = torch.zeros(*x.shape[:2], 2 * x.shape[2] - 1, 2 * x.shape[3] - 1, dtype=x.dtype)
        spread[:, :, ::2, ::2] = x
        kernel = t[f"{name}.weight"].flip(2, 3).transpose(0, 1)
        x = F.conv2d(spread, kernel, t[f"{name}.bias"], padding=2).relu()
    return conv(x, "decoder.12")[:, 0].numpy()


def test_numpy_and_torch_are_the_published_formula(npz, weights):
    codes = np.random.default_rng(0).integers(0, 128, (5, 16))
    truth, ours, fast = published(codes, weights), reference.load(npz)(codes), MaskDecoder.load(npz)(codes)
    assert truth.shape == ours.shape == fast.shape == (5, 64, 64)
    assert 0.1 < (truth > 0).mean() < 0.9
    assert (ours.dtype, fast.dtype, fast.requires_grad) == (np.float64, torch.float32, False)
    np.testing.assert_allclose(ours, truth, atol=1e-11 * np.abs(truth).max())
    np.testing.assert_allclose(fast, truth, atol=2e-5 * np.abs(truth).max())  # float32 through ten layers
    assert reference.load(npz)(codes[:0]).shape == (0, 64, 64)


def known_masks() -> dict[str, np.ndarray]:
    pictures = {name: Image.new("1", (64, 64)) for name in ("disc", "bar", "corner", "ring", "dots")}
    pens = {name: ImageDraw.Draw(picture) for name, picture in pictures.items()}
    pens["disc"].ellipse((4, 4, 59, 59), fill=1)
    pens["bar"].rectangle((20, 0, 34, 63), fill=1)
    pens["corner"].polygon([(0, 0), (63, 0), (0, 63)], fill=1)
    pens["ring"].ellipse((2, 2, 61, 61), outline=1, width=10)
    pens["dots"].point([(x, y) for x in range(0, 64, 3) for y in range(0, 64, 2)], fill=1)
    return {name: np.asarray(picture) for name, picture in pictures.items()}


@pytest.mark.parametrize("bins", [1024, 1023])
def test_masks_go_through_codes_and_back(npz, weights, tiny, bins):
    """The encoder writes masks as text, in boxes of a picture that is not square; both decoders read the same
    pixels from it."""
    processor, size = Processor.load(tiny), (317, 211)
    codes = {name: masks.encode(mask, weights) for name, mask in known_masks().items()}
    assert len({tuple(c) for c in codes.values()}) == len(codes)
    parts = []
    for i, (name, numbers) in enumerate(codes.items()):
        box = f"<loc0{100 + 9 * i}><loc0020><loc0{700 + 31 * i}><loc0997>"
        parts.append(box + "".join(f"<seg{c:03}>" for c in numbers) + f" {name}")
    ids = processor.tokenizer.encode(" ; ".join(parts))
    decoders = (reference.load(npz), MaskDecoder.load(npz))
    answers = [processor.parse(ids, size, bins=bins, mask_decoder=decoder) for decoder in decoders]
    for ours, fast in zip(*(answer.objects for answer in answers), strict=True):
        assert list(ours.codes) == codes[ours.label]
        assert ours == fast
        np.testing.assert_allclose(ours.soft_mask, fast.soft_mask, atol=1e-4)
        nearest = Image.fromarray(np.abs(ours.soft_mask)).resize(ours.box_mask.shape[::-1], Image.NEAREST)
        sure = np.asarray(nearest) > 1e-3
        assert ours.mask.shape == fast.mask.shape == (211, 317)
        assert (ours.box_mask == fast.box_mask)[sure].all()
        x0, y0, x1, y1 = ours.box
        assert ours.mask.sum() == ours.mask[y0:y1, x0:x1].sum() > 0
    assert len(answers[0].objects) == 5


def test_no_masks_without_a_decoder_and_no_decoding_without_codes(tiny):
    tokenizer, box = Processor.load(tiny).tokenizer, "<loc0001><loc0001><loc0500><loc0500>"
    (o,) = parse(tokenizer, tokenizer.encode(box + 16 * "<seg007>"), (64, 64)).objects
    assert (len(o.codes), o.mask, o.soft_mask) == (16, None, None)
    ids = tokenizer.encode(f"{box} cat")
    parse(tokenizer, ids, (64, 64), mask_decoder=lambda codes: pytest.fail("was called"))


# The file


def broken(path, how: str, weights) -> None:
    decoder = {name: array for name, array in weights.items() if not name.startswith("encoder")}

    def codebook(rows: int, columns: int) -> dict[str, np.ndarray]:
        return decoder | {"_vq_vae._embedding": np.zeros((rows, columns), np.float32)}

    changes = {
        "missing": {name: array for name, array in decoder.items() if name != "decoder.6.bias"},
        "unexpected": decoder | {"decoder.14.weight": np.zeros(3, np.float32)},
        "misshapen": decoder | {"decoder.8.weight": np.zeros((64, 32, 3, 3), np.float32)},
        "no codebook": {name: array for name, array in decoder.items() if "_vq" not in name},
        "codebook too wide": codebook(128, 5000),
        "codebook of another decoder": codebook(128, masks.E + 1),
        "codebook too long": codebook(129, masks.E),
        "integers": decoder | {"decoder.0.bias": np.zeros(128, int)},
        "pickled": decoder | {"decoder.0.bias": np.array([print] * 128, dtype=object)},
        "NaN": decoder | {"decoder.0.bias": np.full(128, np.nan, np.float32)},
    }
    masks.write_npz(path, changes.get(how, decoder))
    content = path.read_bytes()
    if how == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        at = content.index(decoder["decoder.4.weight"].tobytes())
        path.write_bytes(content[:at] + b"\0\0\x80?" + content[at + 4 :])
    elif how == "no npz":
        path.write_bytes(b"<html>sign in</html>")
    elif how == "header that lies":
        header, fields = io.BytesIO(), {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)}
        np.lib.format.write_array_header_1_0(header, fields)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("decoder.99.weight.npy", header.getvalue())
    elif how == "doubled":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("decoder.0.bias.npy", b"")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 arrays are missing \(decoder.6.bias\)"),
        ("unexpected", r"1 arrays are unexpected \(decoder.14.weight\)"),
        ("misshapen", r"decoder.8.weight has shape \(64, 32, 3, 3\); it must be \(64, 32, 4, 4\)"),
        ("no codebook", "it has no _vq_vae._embedding"),
        ("codebook too wide", r"_embedding has shape \(128, 5000\); it must be \(128, E\)"),
        (
            "codebook of another decoder",
            r"decoder.0.weight has shape \(128, 24, 1, 1\); it must be \(128, 25, 1, 1\)",
        ),
        ("codebook too long", r"_embedding has shape \(129, 24\); it must be \(128, 24\)"),
        ("integers", "decoder.0.bias.npy holds int64, not floating-point numbers"),
        ("pickled", "decoder.0.bias.npy holds object"),
        ("NaN", "decoder.0.bias.npy holds NaN or infinity"),
        ("cut off", "not a zip file"),
        ("changed", "Bad CRC-32"),
        ("no npz", "not a zip file"),
        ("header that lies", "has 128 bytes; float32"),
        ("doubled", "two arrays of one name"),
    ],
)
def test_a_file_that_is_not_the_decoder(tmp_path, weights, how, message):
    path = tmp_path / "vae.npz"
    broken(path, how, weights)
    for load in (reference.load, MaskDecoder.load):
        with pytest.raises(PaliGemmaError, match=message) as raised:
            load(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_decoder_without_the_encoder_and_in_other_formats(tmp_path, weights, npz):
    double = {name: array.astype(np.float64) for name, array in weights.items()}
    decoder = {name: array for name, array in double.items() if not name.startswith("encoder")}
    masks.write_npz(tmp_path / "small.npz", decoder, save=np.savez_compressed)
    codes = np.arange(16)[None]
    assert torch.equal(MaskDecoder.load(tmp_path / "small.npz")(codes), MaskDecoder.load(npz)(codes))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PaliGemmaError, match="there is no such file; the mask decoder is at https://"):
        MaskDecoder.load(tmp_path / "x.npz")


# Fetched on first use


class Server:
    """Answers each request with what `answer(handler)` does."""

    def __init__(self, answer):
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/vae-oid.npz"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


def send(content: bytes, *, status: int = 200, length: int | None = None, then=lambda handler: None):
    def answer(handler):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)
        then(handler)

    return answer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The directory in the hub's cache for files from elsewhere; downloads are switched on."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for module in (constants, _cache_assets):
        monkeypatch.setattr(module, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tmp_path / "assets" / "paligemma" / "mask_decoder" / "default"


def serve(monkeypatch, answer) -> Server:
    server = Server(answer)
    monkeypatch.setattr(mask_weights, "URL", server.url)
    return server


def test_it_is_fetched_once_and_kept(cache, monkeypatch, npz, capsys):
    server = serve(monkeypatch, send(npz.read_bytes()))
    first, second = mask_weights.find(), mask_weights.find()
    assert first == second == cache / "vae-oid.npz"
    assert len(server.requests) == 1
    assert first.read_bytes() == npz.read_bytes()
    assert os.listdir(cache) == ["vae-oid.npz"]
    assert capsys.readouterr().err == f"fetching the mask decoder from {server.url}\n"
    assert MaskDecoder.load()(np.zeros((1, 16), int)).shape == (1, 64, 64)
    server.http.shutdown()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (send(b"", status=404), "answers 404"),
        (send(b"<html>sign in</html>"), "is not the mask decoder"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "cannot be fetched"),
        (lambda handler: handler.connection.close(), "cannot be fetched"),
        ("half", "is not the mask decoder"),
        ("stall", "timed out"),
        ("endless", "sends more than 1 MB"),
    ],
)
def test_what_is_not_whole_is_not_kept(cache, monkeypatch, npz, answer, message):
    content = npz.read_bytes()
    if answer == "half":
        answer = send(content[: len(content) // 2], length=len(content))
    elif answer == "stall":
        answer = send(content[:1000], length=len(content), then=lambda handler: time.sleep(0.6))
    elif answer == "endless":
        monkeypatch.setattr(mask_weights, "LIMIT", 1 << 20)
        answer = send(bytes(1 << 21), length=1 << 40)
    monkeypatch.setattr(mask_weights, "TIMEOUT", 0.3)
    server = serve(monkeypatch, answer)
    with pytest.raises(PaliGemmaError, match=message) as raised:
        mask_weights.find()
    assert "\n" not in str(raised.value)
    assert "--mask-decoder" in str(raised.value)
    assert os.listdir(cache) == []
    server.http.shutdown()
    monkeypatch.setattr(mask_weights, "LIMIT", 64 << 20)
    serve(monkeypatch, send(content))
    assert mask_weights.find().read_bytes() == content  # and the next time it works


def test_nobody_is_there(cache, monkeypatch):
    monkeypatch.setattr(mask_weights, "URL", "http://127.0.0.1:9/vae-oid.npz")
    message = r"cannot be fetched from http://127.0.0.1:9.*refused.*--mask-decoder"
    with pytest.raises(PaliGemmaError, match=message):
        mask_weights.find()


@pytest.mark.parametrize("switch", ["local_files_only", "HF_HUB_OFFLINE"])
def test_nothing_is_fetched_when_downloads_are_off(cache, monkeypatch, switch):
    from huggingface_hub import constants

    server = serve(monkeypatch, send(b""))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    message = r"^the mask decoder is not in the cache .* downloads are switched off: download http"
    with pytest.raises(PaliGemmaError, match=message):
        mask_weights.find(local_files_only=switch == "local_files_only")
    assert server.requests == []


def test_a_cache_that_cannot_be_written(cache, tmp_path):
    (tmp_path / "assets").write_text("")
    with pytest.raises(PaliGemmaError, match=r"cannot be kept in .*: set HF_HOME"):
        mask_weights.find()


# On the command line


BOXES = ("<loc0100><loc0200><loc0700><loc0900>", "<loc0000><loc0000><loc0500><loc0300>")
SEG = "".join(f"<seg{8 * i:03}>" for i in range(16))
ANSWER = f"{BOXES[0]}{SEG} red cat/dog ; {BOXES[1]} ; {BOXES[1]}{SEG} ; <loc0001>"


@pytest.fixture
def says(monkeypatch, tiny, tmp_path, cache):
    """The command line with a model that says ANSWER about a picture of 90 x 60."""
    tokenizer = Processor.load(tiny).tokenizer

    def stream(self, log_probs=None, **inputs):
        for i in [*tokenizer.encode(ANSWER), 1]:
            if log_probs is not None:
                log_probs.append(torch.tensor([-0.5]))
            yield torch.tensor([i])

    monkeypatch.setattr(PaliGemma, "stream", stream)
    Image.effect_noise((90, 60), 90).save(tmp_path / "in.png")
    fixed = ["--model", tiny, "--image", tmp_path / "in.png", "--task", "segment", "--prompt", "x"]
    return lambda *args: generate.main([*map(str, fixed), *map(str, args)])


def test_masks_as_files_and_in_json(says, tmp_path, npz, tiny, capsys):
    out = tmp_path / "new" / "masks"
    assert says("--json", "--masks", out, "--mask-decoder", npz) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(o["label"], o["box"], o.get("mask")) for o in told["objects"]] == [
        ("red cat/dog", [18, 6, 79, 41], str(out / "00-red-cat-dog.png")),
        ("", [0, 0, 26, 29], None),
        ("", [0, 0, 26, 29], str(out / "02.png")),
    ]
    assert told["faults"] == [{"text": "<loc0001>", "fault": "1 <loc> token where a box has 4"}]
    found = told["objects"][1]
    scores = {name: found[name] for name in ("score", "box_score", "label_score")}
    assert scores == pytest.approx({"score": np.exp(-0.125), "box_score": np.exp(-0.5), "label_score": 1})
    assert told["text"] == ANSWER
    assert len(told["log_probs"]) == len(told["tokens"])
    tokenizer = Processor.load(tiny).tokenizer
    answer = parse(tokenizer, tokenizer.encode(ANSWER), (90, 60), mask_decoder=reference.load(npz))
    assert sorted(os.listdir(out)) == ["00-red-cat-dog.png", "02.png"]
    for o, said in zip(answer.objects, told["objects"], strict=True):
        if o.mask is not None:
            assert np.array_equal(np.asarray(Image.open(said["mask"])), np.where(o.mask, 255, 0))


def test_on_stdout_is_the_answer_alone(says, tmp_path, npz, capsys):
    assert says("--masks", tmp_path / "masks", "--mask-decoder", npz, "--draw", tmp_path / "out.png") == 0
    told = capsys.readouterr()
    assert told.out == f"{ANSWER}\n"
    assert told.err.splitlines()[1] == "no object: '<loc0001>': 1 <loc> token where a box has 4"
    assert Image.open(tmp_path / "out.png").size == (90, 60)


@pytest.mark.parametrize("wanted", ["--masks", "--draw"])
def test_masks_fetch_the_decoder(says, tmp_path, monkeypatch, npz, wanted):
    server = serve(monkeypatch, send(npz.read_bytes()))
    assert says(wanted, tmp_path / "out.png") == 0
    assert len(server.requests) == 1


def test_without_a_decoder_it_fails_before_the_work(says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mask_weights, "URL", "http://127.0.0.1:9/vae-oid.npz")
    assert says("--draw", tmp_path / "out.png") == 1
    told = capsys.readouterr()
    assert told.out == ""
    message = "error: the mask decoder cannot be fetched from http://127.0.0.1:9"
    assert told.err.splitlines()[-1].startswith(message)
    assert not (tmp_path / "out.png").exists()


def test_what_needs_no_masks_fetches_none(says, capsys):
    assert says("--json") == 0
    assert ["mask" in o for o in json.loads(capsys.readouterr().out)["objects"]] == [False] * 3


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_wrong_decoder_is_said_before_the_work(tiny, image_file, tmp_path, backend):
    (tmp_path / "x.npz").write_text("hello")
    args = ["--model", tiny, "--image", image_file, "--prompt", "x", "--backend", backend]
    done = run(*args, "--mask-decoder", tmp_path / "x.npz")
    assert_one_line(done, "x.npz is not the mask decoder, vae-oid.npz")


def test_offline_is_respected(tiny, image_file, tmp_path):
    args = ["--model", tiny, "--image", image_file, "--prompt", "x", "--masks", tmp_path / "masks"]
    done = run(*args, env={"HF_HOME": tmp_path / "home"})
    remedy = "--mask-decoder"
    assert_one_line(done, "the mask decoder is not in the cache", "downloads are switched off", remedy)
