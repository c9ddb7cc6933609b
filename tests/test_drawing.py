"""Drawn pictures: their contents, on any background and at any size; and how they are saved."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import assert_one_line, run
from PIL import Image
from test_generate import line

from paligemma import PaliGemmaError, generate
from paligemma.answers.drawing import check_writable, colour, contrast, draw, save
from paligemma.answers.parsing import Object

DISC = (1 - np.hypot(*np.mgrid[-1.2:1.2:64j, -1.2:1.2:64j])).astype(np.float32)  # above 0 on a disc
GREY = (128, 128, 128)
GROUNDS = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": GREY, "as the object": colour("cat")}


def thing(box, size, label="cat", mask=False) -> Object:
    return Object(label, box, 0.5, (0,) * 16 if mask else (), DISC if mask else None, size, "")


def pixels(size, objects, ground=GREY) -> np.ndarray:
    return np.asarray(draw(Image.new("RGB", size, ground), objects)).astype(int)


def changed(size, objects, ground=GREY) -> np.ndarray:
    return (pixels(size, objects, ground) != ground).any(axis=2)


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (1500, 1000)])
def test_nothing_is_drawn_of_nothing(size):
    assert not changed(size, []).any()


def test_the_picture_itself_is_left_alone():
    image = Image.new("RGB", (64, 64))
    draw(image, [thing((5, 5, 50, 50), image.size, mask=True)])
    assert not np.asarray(image).any()


@pytest.mark.parametrize("size", [(64, 48), (640, 480), (1600, 1200)])
@pytest.mark.parametrize("ground", GROUNDS)
def test_a_box_is_around_its_pixels_and_seen_on_any_ground(size, ground):
    x0, y0, x1, y1 = box = (size[0] // 4, size[1] // 2, size[0] // 2, size[1] * 3 // 4)
    drawn = pixels(size, [thing(box, size, label="")], GROUNDS[ground])
    far = (drawn - GROUNDS[ground]).astype(float)
    seen = np.abs(far).max(axis=2) > 60
    assert not seen[y0 + size[1] // 40 : y1 - size[1] // 40, x0 + size[0] // 40 : x1 - size[0] // 40].any()
    x, y = (x0 + x1) // 2, (y0 + y1) // 2  # the middle
    for side in (seen[y0 + 5, :x], seen[y0 + 5, x:], seen[:y, x0 + 5], seen[y:, x0 + 5]):
        assert 1 <= side.sum() <= 3 + size[0] // 80
    inside = drawn[y0 + 5, x0 + 5] if size[0] > 64 else drawn[y, x]
    assert (inside == GROUNDS[ground]).all()
    assert (drawn == colour("")).all(axis=2).any()


def test_a_box_at_the_edges_is_whole():
    drawn = pixels((300, 200), [thing((0, 0, 300, 200), (300, 200), label="")])
    own = (drawn == colour("")).all(axis=2)
    for side in (own[:4].any(axis=0), own[-4:].any(axis=0), own[:, :4].any(axis=1), own[:, -4:].any(axis=1)):
        assert side.sum() >= len(side) - 4
    assert (drawn[10:-10, 10:-10] == 128).all()


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_mask_is_tinted_and_outlined(ground):
    size, box = (400, 300), (50, 60, 350, 260)
    o = thing(box, size, mask=True)
    drawn, mask = pixels(size, [o], GROUNDS[ground]), o.mask
    away = np.zeros_like(mask)
    away[70:250, 60:340] = True  # of the frame
    assert (drawn[~mask & away] == GROUNDS[ground]).all()
    middle = drawn[160, 200] - np.array(GROUNDS[ground])
    assert np.abs(middle - 0.4 * (np.array(colour("cat")) - GROUNDS[ground])).max() <= 1
    for paint in (colour("cat"), contrast(colour("cat"))):
        assert ((drawn == paint).all(axis=2) & away & mask).sum() > 200


def luminance(paint) -> float:
    return sum(w * (v / 255) ** 2.2 for w, v in zip((0.2126, 0.7152, 0.0722), paint, strict=True))


def test_a_label_has_one_colour_and_is_read_on_it():
    assert colour("cat") == colour("cat") != colour("dog")
    assert len({colour(f"label {n}") for n in range(1000)}) == 48
    for n in range(200):
        ground = colour(f"label {n}")
        dark, bright = sorted(map(luminance, (ground, contrast(ground))))
        assert (bright + 0.05) / (dark + 0.05) > 3.5  # WCAG asks for 3 for large letters


def test_letters_and_lines_grow_with_the_picture():
    frames, labels = [], []
    for side in (600, 1200, 2400):
        box, size = (side // 4, side // 2, side // 2, side * 3 // 4), (side, side)
        frames.append(changed(size, [thing(box, size, label="")]).mean())
        labels.append(changed(size, [thing(box, size)]).mean() - frames[-1])
    assert max(frames) < 1.5 * min(frames)  # widths are rounded to whole pixels
    # Labels are relatively larger in small pictures. With letters of one size the ratio would be 16.
    assert 2 * min(labels) > max(labels) > 1.2 * min(labels)


def test_labels_do_not_hide_one_another():
    size, labels = (800, 600), ["cat", "dog", "person"]
    objects = [thing((100 + n, 200 + n, 300 + n, 400 + n), size, label) for n, label in enumerate(labels)]
    around = np.ones(size[::-1], bool)
    around[190:412, 90:312] = False  # the frames

    def area(drawn: np.ndarray, label: str) -> int:
        return ((drawn == colour(label)).all(axis=2) & around).sum()

    together = pixels(size, objects)
    for o in objects:
        assert area(together, o.label) > 0.9 * area(pixels(size, [o]), o.label) > 100, o.label


def test_a_label_without_a_place_is_left_out():
    """There is room for two labels, and the three frames are in the same place."""
    size = (70, 40)
    objects = [thing((0, 0, *size), size, label) for label in ("cat cat cat", "dog dog dog", "cup cup cup")]
    assert np.array_equal(pixels(size, objects), pixels(size, objects[1:]))
    for o in objects[1:]:
        assert (pixels(size, objects) == colour(o.label)).all(axis=2).sum() > 300


LABELS = ["a very long label " * 20, "naïve Käse", "猫", "a\nb", "x" * 300, "\u200b", "<loc"]


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("size", [(1, 1), (20, 12), (64, 64), (300, 9)])
def test_any_label_on_any_picture(label, size):
    drawn = draw(Image.new("RGB", size), [thing((0, 0, *size), size, label, mask=True)] * 3)
    assert (drawn.size, drawn.mode) == (size, "RGB")


def test_forty_objects():
    rng, size = np.random.default_rng(0), (1000, 700)
    objects = []
    for n in range(40):
        x, y = rng.integers(0, 900), rng.integers(0, 600)
        objects.append(thing((int(x), int(y), int(x) + 80, int(y) + 60), size, f"label {n}", mask=n % 2 == 0))
    drawn = pixels(size, objects)
    assert sum((drawn == colour(o.label)).all(axis=2).any() for o in objects) == 40


# Files


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_text("before")

    def fails(self, file, *args, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", fails)
        with pytest.raises(OSError, match="No space left"):
            save(Image.new("RGB", (9, 9)), path)
    assert (os.listdir(tmp_path), path.read_text()) == (["out.png"], "before")
    save(Image.new("RGB", (9, 9)), path)
    assert (os.listdir(tmp_path), Image.open(path).size) == (["out.png"], (9, 9))


def test_a_link_stays_and_a_mode_is_kept(tmp_path):
    """The suffix of the given name determines the format, not that of the link's target."""
    target, link = tmp_path / "stored", tmp_path / "out.webp"
    target.write_bytes(b"before")
    target.chmod(0o600)
    link.symlink_to("stored")
    save(Image.new("RGB", (9, 9)), link)
    assert link.is_symlink()
    assert (target.stat().st_mode & 0o777, Image.open(target).format) == (0o600, "WEBP")


def test_labels_that_no_font_has_are_told_in_one_line(tmp_path, monkeypatch, capsys):
    args = generate.parse_args(["--image", "x", "--prompt", "detect", "--draw", str(tmp_path / "out.png")])
    image, labels = Image.new("RGB", (200, 200)), ("cat", "\U0010fffd", "\U0010fffc", "\U0010fffd")
    objects = [thing((9, 9, 90, 90), image.size, label) for label in labels]
    generate.report(args, [image], SimpleNamespace(objects=objects, faults=[]), "stop", {})
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("hint: no font on this machine has every letter of '\\U0010fffd', '\\U0010fffc', ")
    generate.report(args, [image], SimpleNamespace(objects=objects[:1], faults=[]), "stop", {})
    assert capsys.readouterr() == ("", "")


def test_drawn_on_the_command_line(tiny, image_file, tmp_path):
    for name in ("out.png", "out.JPG", "out.webp"):
        done = run(*line(tiny, image_file, "--no-sample", "--draw", tmp_path / name))
        assert done.code == 0, done
        assert Image.open(tmp_path / name).size == Image.open(image_file).size
    assert done.out == run(*line(tiny, image_file, "--no-sample")).out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--draw", "no/out.png"], "no/out.png cannot be written: its directory is missing or read-only"),
        (["--draw", "here"], "here is a directory: give the name of a picture"),
        (["--draw", "out.txt"], "out.txt does not name a picture: end it in .png"),
        (["--draw", "image.png"], "--draw image.png would overwrite the image"),
        (["--draw", "pipe.png"], "pipe.png is not a regular file: give another name"),
        (["--masks", "image.png"], "image.png cannot be made a directory"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(image_file, tmp_path, args, message):
    (tmp_path / "here").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "image.png").write_bytes(image_file.read_bytes())
    args = ["--model", "nowhere", "--image", "image.png", "--prompt", "x", *args]
    done = run(*args, cwd=tmp_path, env={"PYTHONPATH": os.getcwd()})
    assert_one_line(done, message)
    assert sorted(os.listdir(tmp_path)) == ["here", "image.png", "pipe.png"]


def test_a_directory_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PaliGemmaError, match="cannot be written"):
        check_writable(tmp_path / "out.png")
    with pytest.raises(PaliGemmaError, match="cannot be written"):
        check_writable(tmp_path / "masks", directory=True)
