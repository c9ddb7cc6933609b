"""Frames of a video: which ones, from which files, upright; one line for every video that cannot be used."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from command_line import ROOT, assert_one_line, environment, run
from PIL import Image

from paligemma import PaliGemmaError
from paligemma.video import read_frames

FRAMES, STEP = 30, 8  # the grey of a frame is STEP times its number
FORMATS = {  # a name -> the codec, and options of the container
    "a.mp4": ("libx264", {}), "fast.mp4": ("libx264", {"movflags": "faststart"}),
    "parts.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}), "a.mkv": ("libx264", {}),
    "a.webm": ("libvpx", {}), "a.avi": ("mpeg4", {}), "a.ts": ("libx264", {}), "raw.h264": ("libx264", {}),
}  # fmt: skip


def write(path, frames: int = FRAMES, codec: str = "libx264", options: dict | None = None, **more) -> Path:
    """A clip whose left part is red, and whose right part gets brighter."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size = more.get("gop", 7)
        for n in range(frames):
            pixels = np.full((48, 64, 3), n * STEP, np.uint8)
            pixels[:, :16] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def numbers(frames: list[Image.Image]) -> list[int]:
    """The numbers of the frames, from their grey."""
    return [round(np.asarray(frame)[:, 40:].mean() / STEP) for frame in frames]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for name, (codec, options) in FORMATS.items():
        write(root / name, codec=codec, options=options)
    return root


MIDDLES = {1: [15], 2: [7, 22], 4: [3, 11, 18, 26], 30: list(range(30))}


@pytest.mark.parametrize("count", MIDDLES)
@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_the_middles_of_equal_parts(clips, name, count):
    frames = read_frames(clips / name, count)
    assert numbers(frames) == MIDDLES[count]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.parametrize("gop", [1, 7, 100])
def test_sixteen_frames_wherever_decoding_can_start(tmp_path, gop):
    expected = [(2 * i + 1) * FRAMES // 32 for i in range(16)]
    assert numbers(read_frames(write(tmp_path / "clip.mp4", gop=gop))) == expected


def test_sources(clips):
    data = (clips / "a.mp4").read_bytes()

    class Pipe(io.RawIOBase):  # cannot be sought in
        def __init__(self):
            self.file = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.file.readinto(buffer)

    with open(clips / "a.mp4", "rb") as file:
        for source in (str(clips / "a.mp4"), data, bytearray(data), file, Pipe()):
            assert numbers(read_frames(source, 4)) == MIDDLES[4]
        assert not file.closed


def matrix(*values: float) -> bytes:
    """A display matrix as an .mp4 file stores it."""
    return b"".join(
        struct.pack(">i", round(v * (1 << (30 if n % 3 == 2 else 16)))) for n, v in enumerate(values)
    )


UPRIGHT = matrix(1, 0, 0, 0, 1, 0, 0, 0, 1)
TURNS = {  # the matrix of the track header -> the side on which the red part is shown
    (1, 0, 0, 0, 1, 0, 0, 0, 1): "left", (0, 1, 0, -1, 0, 0, 48, 0, 1): "top",
    (-1, 0, 0, 0, -1, 0, 64, 48, 1): "right", (0, -1, 0, 1, 0, 0, 0, 64, 1): "bottom",
}  # fmt: skip


@pytest.mark.parametrize(("turn", "side"), TURNS.items(), ids=TURNS.values())
def test_frames_are_upright(clips, turn, side):
    """(x, y) is shown at (a x + c y, b x + d y): a telephone held upright writes a = d = 0, b = 1, c = -1."""
    data = (clips / "a.mp4").read_bytes()
    track = data.index(b"tkhd")
    place = data.index(UPRIGHT, track)
    (frame,) = read_frames(data[:place] + matrix(*turn) + data[place + 36 :], 1)
    assert frame.size == ((64, 48) if side in ("left", "right") else (48, 64))
    pixels = np.asarray(frame).astype(int)
    edges = {"left": pixels[:, :8], "right": pixels[:, -8:], "top": pixels[:8], "bottom": pixels[-8:]}
    red = {name for name, edge in edges.items() if (edge[..., 0] - edge[..., 1]).min() > 150}
    assert red == {side}


def cut(path: Path, part: float = 0.6) -> bytes:
    data = path.read_bytes()
    return data[: int(len(data) * part)]


@pytest.mark.parametrize("name", ["a.mp4", "fast.mp4", "parts.mp4", "a.mkv", "a.webm", "a.avi"])
def test_a_clip_that_is_cut_off(clips, name):
    with pytest.raises(PaliGemmaError, match=r"^the video .* cut off") as caught:
        read_frames(cut(clips / name), 2)
    assert "\n" not in str(caught.value)


def test_a_damaged_frame(clips):
    data = bytearray((clips / "a.avi").read_bytes())
    middle = len(data) // 2
    data[middle - 3000 : middle + 3000] = os.urandom(6000)
    try:
        assert len(read_frames(bytes(data), 30)) == 30
    except PaliGemmaError as error:
        assert "\n" not in str(error)  # noqa: PT017  either is right: noise may look like a frame


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("source", "message"), [
    (lambda clips: clips / "a.mp4", "a.mp4 has 30 frames, and 31 are asked for: ask for at most 30"),
    (lambda clips: "missing.mp4", "missing.mp4: there is no such file"),
    (lambda clips: "https://a.b/c.mp4", "https://a.b/c.mp4 is a URL, and only files are read: download it"),
    (lambda clips: clips, "it cannot be read as a video: Is a directory"),
    (lambda clips: b"", "the video is empty: it has 0 bytes"),
    (lambda clips: b"not a video", "the video cannot be read as a video: it is damaged or cut off"),
    (lambda clips: sound(), "the video has no pictures that can be read: it is not a video, or is cut off"),
    (lambda clips: picture(), "the video has 1 frame, and 31 are asked for: ask for at most 1"),
    (lambda clips: 3, "the video is a int; it must be a path, bytes or an open binary file"),
])  # fmt: skip
def test_what_is_refused(clips, source, message, capfd):
    with pytest.raises(PaliGemmaError) as caught:
        read_frames(source(clips), 31)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # FFmpeg prints nothing


def test_an_empty_file_and_no_frames(tmp_path, clips):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(PaliGemmaError, match=r"empty\.mp4 is empty: it has 0 bytes"):
        read_frames(tmp_path / "empty.mp4")
    with pytest.raises(PaliGemmaError, match="0 frames are asked for; it must be at least 1"):
        read_frames(clips / "a.mp4", 0)


def test_a_playlist_opens_no_other_file(tmp_path, clips):
    list_ = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{clips / 'a.ts'}\n#EXT-X-ENDLIST\n"
    names = {"x.m3u8": list_, "x.ffconcat": f"ffconcat version 1.0\nfile {clips / 'a.mp4'}\n"}
    for name, text in names.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(PaliGemmaError, match="cannot be read as a video"):
            read_frames(tmp_path / name, 4)
    with open(tmp_path / "x.m3u8", "rb") as file, av.open(file) as container:  # without that care it does
        assert len(list(container.decode(video=0))) == FRAMES


def test_sizes_are_checked_before_frames_are_decoded(clips, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 * 5)  # all frames: twice this number
    assert len(read_frames(clips / "a.mp4", 10)) == 10
    message = "11 frames of 64 x 48 have 33,792 pixels; the limit is 30,720: take at most 10 frames"
    with pytest.raises(PaliGemmaError, match=message):
        read_frames(clips / "a.mp4", 11)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 4)
    with pytest.raises(PaliGemmaError):
        read_frames(clips / "a.mp4", 1)


def line(model, clip, *args) -> list:
    fixed = ["--prompt", "caption en", "--no-sample", "--max-new-tokens", 4, "--dtype", "float32", "--json"]
    return ["--model", model, "--video", clip, *fixed, *args]


def test_the_command_line(tiny, clips, tmp_path):
    """It answers as about the same frames as images, from a file and from stdin."""
    paths = [tmp_path / f"{n}.png" for n in range(4)]
    for frame, path in zip(read_frames(clips / "a.mp4", 4), paths, strict=True):
        frame.save(path)
    images = ["--model", tiny, "--image", *paths, *line(tiny, clips)[4:]]
    expected = json.loads(run(*images).text)
    assert expected["images"] == [{"width": 64, "height": 48}] * 4
    for path, stdin in ((clips / "a.mp4", b""), ("-", (clips / "a.mp4").read_bytes())):
        done = run(*line(tiny, path, "--frames", 4), stdin=stdin)
        assert done.code == 0, done.err
        answer = json.loads(done.text)
        assert {**answer, "timings": 0} == {**expected, "timings": 0}
    assert len(json.loads(run(*line(tiny, clips / "a.mkv")).text)["images"]) == 16
    assert_one_line(run(*line(tiny, clips / "a.mp4", "--frames", 31)), "has 30 frames, and 31 are asked for")
    assert_one_line(run(*line(tiny, clips / "a.mp4", "--draw", "x.png")), "one prompt is about 16", code=2)
    assert_one_line(run(*line(tiny, clips / "a.mp4", "--frames", 0)), "--frames: '0' is not a whole", code=2)


def test_without_the_package(clips, tiny):
    code = f"""
import sys
sys.modules["av"] = None  # an import of it fails
from paligemma import generate
sys.exit(generate.main(["--model", {str(tiny)!r}, "--video", {str(clips / "a.mp4")!r}, "--prompt", "x"]))
"""
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment(), "check": False}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 1
    (told,) = done.stderr.splitlines()[-1:]
    assert told.startswith("error: frames of a video need the package av")
    assert told.endswith("pip install 'paligemma[video]'")
