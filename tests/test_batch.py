"""The command line for many pictures: what it writes, what it does with mistakes, and how it resumes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import ROOT, Command, Finished, assert_one_line, environment, run, wait_for
from conftest import photo
from masks import write_npz

from paligemma import PaliGemmaError, load_hf_model, pipeline
from paligemma.options import Sampling
from paligemma.pipeline import Pipeline, Question, save_masks
from paligemma.questions import Lines, pictures
from paligemma.resumable import Output

KILLS = int(os.environ.get("PALIGEMMA_TEST_KILLS", "3"))  # 20 when run by hand
PROMPTS = ("caption en", "detect cat ; dog", "answer en what is on the long table?", "segment x")
MOST = 6  # new tokens


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A directory of twelve pictures."""
    directory = tmp_path_factory.mktemp("photos")
    for n in range(12):
        photo(40 + 7 * n, 60 - 3 * n, seed=n).save(directory / f"{n:02}.png")
    return directory


def questions(photos: Path, count: int = 12, **more: object) -> list[dict]:
    names = sorted(path.name for path in photos.iterdir())
    return [
        {"id": n, "image": str(photos / names[n % 12]), "prompt": PROMPTS[n % len(PROMPTS)], **more}
        for n in range(count)
    ]


def jsonl(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def arguments(model: Path, out: Path, *args: object) -> list[object]:
    options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", MOST, "--seed", 3]
    return ["--model", model, "--out", out, *options, *args]


def batch(model: Path, out: Path, *args: object, **options) -> Finished:
    return run(*arguments(model, out, *args), module="paligemma.batch", **options)


def told(out: Path) -> dict[object, dict]:
    """The lines of an output by id; each id once, each line whole."""
    data = out.read_bytes()
    assert data.endswith(b"\n") or not data
    lines = [json.loads(line) for line in data.splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def expected(tiny, photos) -> dict[int, dict]:
    """What `generate --json` prints for each question."""
    found = {}
    for q in questions(photos):
        args = ["--model", tiny, "--image", q["image"], "--prompt", q["prompt"], "--json"]
        options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", MOST, "--seed", 3]
        said = json.loads(run(*args, *options).text)
        del said["timings"]
        found[q["id"]] = {"id": q["id"], **said}
    assert len({tuple(line["tokens"]) for line in found.values()}) == len(found)
    return found


def same(line: dict, truth: dict, log_probs: bool = False) -> None:
    """A line is what generate prints, up to the rounding of probabilities."""
    truth = {name: value for name, value in truth.items() if log_probs or name not in ("tokens", "log_probs")}
    assert line.keys() == truth.keys()
    for name, value in truth.items():
        if name == "log_probs":
            assert line[name] == pytest.approx(value, abs=1e-4)
        elif name == "objects":
            for found, right in zip(line[name], value, strict=True):
                scores = {kind: right[kind] for kind in ("score", "box_score", "label_score")}
                assert {kind: found[kind] for kind in scores} == pytest.approx(scores, abs=1e-4)
                assert found | scores == right
        elif name == "image":
            assert line[name] == {**value, "path": line[name]["path"]}
        else:
            assert line[name] == value


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_lines_are_what_generate_prints(tiny, photos, expected, tmp_path, size):
    """Greedy and sampled rows, prompts of different lengths, in batches of any size."""
    out = tmp_path / "out.jsonl"
    source = jsonl(tmp_path / "in.jsonl", questions(photos))
    done = batch(tiny, out, "--jsonl", source, "--batch-size", size, "--log-probs")
    assert (done.code, done.out) == (0, b""), done.err
    found = told(out)
    assert found.keys() == expected.keys()
    for id, line in found.items():
        same(line, expected[id], log_probs=True)


def test_several_images_of_one_prompt(tiny, photos, tmp_path):
    """What generate prints for them, beside rows of one image; the same command has nothing left to do, and
    another order of the images is another question."""
    asked, paths = questions(photos, 4), [str(photos / name) for name in ("02.png", "07.png", "05.png")]
    asked[1]["image"], asked[3]["image"] = paths, paths[:1]
    out, source = tmp_path / "out.jsonl", jsonl(tmp_path / "in.jsonl", asked)
    done = batch(tiny, out, "--jsonl", source, "--batch-size", 3, "--log-probs")
    assert done.code == 0, done.err
    args = ["--model", tiny, "--image", *paths, "--prompt", asked[1]["prompt"], "--json"]
    options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", MOST, "--seed", 3]
    truth = json.loads(run(*args, *options).text)
    del truth["timings"]
    lines = told(out)
    assert [image.pop("path") for image in lines[1]["images"]] == paths
    same(lines[1], {"id": 1, **truth}, log_probs=True)
    assert lines[3]["image"]["path"] == paths[0]
    assert "has all 4 answers" in batch(tiny, out, "--jsonl", source, "--log-probs").err
    asked[1]["image"] = paths[::-1]
    again = batch(tiny, out, "--jsonl", jsonl(source, asked), "--log-probs")
    assert_one_line(again, "another prompt or picture for the id 1")


def test_a_directory_and_a_pattern(tiny, photos, tmp_path):
    (photos / "notes.txt").write_text("no picture")
    out, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    done = batch(tiny, out, "--images", photos, "--task", "detect", "--prompt", "cat;dog")
    assert done.code == 0, done.err
    assert "--batch-size 16" in done.err
    assert "12 rows in" in done.err
    assert "hint: rows with a task" in done.err
    lines = told(out)
    assert sorted(lines) == [f"{n:02}.png" for n in range(12)]
    assert {line["prompt"] for line in lines.values()} == {"detect cat ; dog"}
    assert all("tokens" not in line and "log_probs" not in line for line in lines.values())
    done = batch(tiny, again, "--images", photos / "0[0-3].png", "--task", "detect", "--prompt", "cat;dog")
    by_path = told(again)
    assert sorted(by_path) == [str(photos / f"{n:02}.png") for n in range(4)]
    for n in range(4):
        assert by_path[str(photos / f"{n:02}.png")]["text"] == lines[f"{n:02}.png"]["text"]
    (photos / "notes.txt").unlink()


def test_paths_are_relative_to_the_file_and_stdin_to_the_directory(tiny, photos, tmp_path):
    lines = [{"id": "a", "image": "00.png", "prompt": "x"}, {"id": "b", "image": "01.png"}]
    source = jsonl(photos / "in.jsonl", lines)
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    assert batch(tiny, first, "--jsonl", source, "--prompt", "ocr").code == 0
    done = batch(tiny, second, "--jsonl", "-", "--prompt", "ocr", stdin=source.read_bytes(), cwd=photos)
    assert done.code == 0, done.err
    one, other = told(first), told(second)
    paths = [[lines[id]["image"].pop("path") for id in "ab"] for lines in (one, other)]
    assert paths == 2 * [[str(photos / name) for name in ("00.png", "01.png")]]
    assert one == other
    assert [one[id]["prompt"] for id in "ab"] == ["x", "ocr"]
    source.unlink()


def test_bad_rows_are_error_rows(tiny, photos, tmp_path, expected):
    """A corrupt picture, a missing one, a bomb, a prompt that is too long: the others are answered."""
    (tmp_path / "torn.png").write_bytes((photos / "00.png").read_bytes()[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    bomb = b"P5 20000 20000 255\n"  # 400 million pixels
    (tmp_path / "bomb.pgm").write_bytes(bomb + b"\0" * 10)
    bad = {
        "torn": ("torn.png", "x", "cannot be read as an image"), "empty": ("empty.png", "x", "has 0 bytes"),
        "bomb": ("bomb.pgm", "x", "pixels, Pillow's limit"), "none": ("none.png", "x", "no such file"),
        "long": (str(photos / "01.png"), "word " * 9000, "tokens; with 16 for the image"),
        "nearly": (str(photos / "01.png"), "0" * 8170, "positions; this model has 8192"),
    }  # fmt: skip
    lines: list = [{"id": id, "image": image, "prompt": text} for id, (image, text, _) in bad.items()]
    source = jsonl(tmp_path / "in.jsonl", lines[:3] + questions(photos) + lines[3:])
    out = tmp_path / "out.jsonl"
    done = batch(tiny, out, "--jsonl", source)
    assert done.code == 1
    assert done.err.splitlines()[-1] == f"error: {len(bad)} of 18 rows failed; their lines in {out} say why"
    found = told(out)
    for id, (_, _, message) in bad.items():
        assert found[id].keys() == {"id", "error"}
        assert message in found[id]["error"], found[id]
    for id, truth in expected.items():
        same(found[id], truth)
    # Errors are tried again, in the same file; the answers are kept.
    (tmp_path / "none.png").write_bytes((photos / "02.png").read_bytes())
    done = batch(tiny, out, "--jsonl", source)
    assert done.code == 1
    assert f"{out} has 12 of 18 answers: the others are computed" in done.err
    again = told(out)
    assert again.keys() == found.keys()
    assert "text" in again["none"]
    assert [line for line in again.values() if line["id"] in expected] == [
        found[id] for id in found if id in expected
    ]


@pytest.mark.parametrize(("lines", "parts"), [
    (['{"id": 1, "image": "a.png", "prompt": "x"}', "{"], ["line 2: it is not JSON"]),
    (["[1]"], ["line 1: it is [1]; it must be an object with id, image, prompt"]),
    ([{"id": 1, "image": "a", "prompt": "x", "propmt": 1}],
     ["line 1: it has 'propmt'; the names are id, image, prompt, task, lang"]),
    ([{"id": 1, "image": "a", "prompt": "x"}, {"id": "1", "image": "b", "prompt": "x"}],
     ["line 2: the id '1' is that of line 1 too"]),
    ([{"image": "a", "prompt": "x"}], ["line 1: id is None; it must be a text or a whole number"]),
    ([{"id": True, "image": "a", "prompt": "x"}], ["line 1: id is True"]),
    ([{"id": 1, "prompt": "x"}], ["image is None; it must be the path of a picture, or a list of paths"]),
    ([{"id": 1, "image": ["a", ""], "prompt": "x"}], ["line 1: image is ['a', '']"]),
    ([{"id": 1, "image": [], "prompt": "x"}], ["line 1: image is []"]),
    ([{"id": 1, "image": "a"}], ["line 1: it has neither prompt nor task"]),
    ([{"id": 1, "image": "a", "prompt": 5}], ["line 1: prompt is 5; it must be a text"]),
    ([{"id": 1, "image": "a", "prompt": "\ud83d"}], ["line 1: prompt is", "it must be UTF-8 text"]),
    ([{"id": 1, "image": "a", "task": "dance"}], ["line 1: the task is 'dance'"]),
    ([{"id": 1, "image": "a", "prompt": "x", "lang": "de"}], ["line 1: lang goes with a task"]),
    (['{"id": 1, "image": "' + "a" * (1 << 20) + '"}'], ["line 1: it is longer than 1,048,576 bytes"]),
])  # fmt: skip
def test_a_wrong_line_is_named(tiny, tmp_path, lines, parts):
    source, out = jsonl(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    done = batch(tiny, out, "--jsonl", source)
    assert_one_line(done, str(source), *parts)
    assert not out.exists()


def test_a_wrong_line_of_stdin_ends_the_run_after_the_lines_before_it(tiny, photos, tmp_path):
    lines, out = [*questions(photos, 3), "oops"], tmp_path / "out.jsonl"
    data = jsonl(tmp_path / "in.jsonl", lines).read_bytes()
    done = batch(tiny, out, "--jsonl", "-", stdin=data)
    assert done.code == 1
    assert "error: stdin, line 4: it is not JSON" in done.err
    assert set(told(out)) == {0, 1, 2}


@pytest.mark.parametrize(("args", "part"), [
    (["--images", "x"], "--images needs --prompt or --task"),
    (["--prompt", "x"], "one of the arguments --images --jsonl is required"),
    (["--images", "x", "--jsonl", "y", "--prompt", "x"], "not allowed with"),
    (["--images", "", "--prompt", "x"], "--images is empty"),
    (["--jsonl", "x", "--lang", "de"], "--lang goes with --task"),
    (["--jsonl", "x", "--task", "detect"], "--task: the task detect needs"),
    (["--jsonl", "x", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
    (["--jsonl", "x", "--backend", "reference"], "invalid choice"),
])  # fmt: skip
def test_wrong_usage(tiny, tmp_path, args, part):
    assert_one_line(batch(tiny, tmp_path / "out.jsonl", *args), part, code=2)


def test_what_cannot_be_read_or_written(tiny, photos, tmp_path):
    out = tmp_path / "out.jsonl"
    assert_one_line(batch(tiny, out, "--jsonl", tmp_path / "none"), "none cannot be read: No such file")
    missing = batch(tiny, out, "--images", tmp_path / "*.gif", "--prompt", "x")
    assert_one_line(missing, "*.gif is not a directory, and no file matches it")
    assert_one_line(
        batch(tiny, out, "--images", tmp_path, "--prompt", "x"), "has no file whose name ends like"
    )
    ask = ("--images", photos, "--prompt", "x")
    assert_one_line(batch(tiny, tmp_path, *ask), "is not a regular file: give another name")
    assert_one_line(batch(tiny, tmp_path / "no" / "out", *ask), "its directory is missing or read-only")
    other = jsonl(tmp_path / "other.jsonl", [{"id": 1}])
    assert_one_line(batch(tiny, other, *ask), "line 1 is not an answer of this command: give another --out")
    other.write_text(json.dumps({"id": "00.png", "model": "b", "prompt": "x"}) + "\n")
    assert_one_line(batch(tiny, other, *ask), "line 1 is an answer of the model b, not of")
    other.write_text(json.dumps({"id": "00.png", "model": str(tiny), "prompt": "y"}) + "\n")
    before = other.read_bytes()
    assert_one_line(
        batch(tiny, other, *ask), "has an answer to another prompt or picture for the id '00.png'"
    )
    assert other.read_bytes() == before
    answer = {"id": "00.png", "model": str(tiny), "prompt": "x", "image": {"path": "/other/00.png"}}
    other.write_text(json.dumps(answer) + "\n")
    assert_one_line(
        batch(tiny, other, *ask), "has an answer to another prompt or picture for the id '00.png'"
    )


def test_a_changed_model_has_an_output_of_its_own(tiny, photos, tmp_path):
    out, ask = tmp_path / "out.jsonl", ("--images", photos, "--prompt", "x", "--batch-size", 4)
    assert batch(tiny, out, *ask, "--quantize", "int8").code == 0
    assert {line["model"] for line in told(out).values()} == {f"{tiny} (int8)"}
    again = batch(tiny, out, *ask, "--quantize", "int8")
    assert (again.code, again.err) == (0, f"{out} has all 12 answers\n")
    assert_one_line(batch(tiny, out, *ask), f"line 1 is an answer of the model {tiny} (int8), not of {tiny}:")


def test_which_pictures_are_asked_about(tiny, tmp_path):
    for name in ("a.png", "b[1].jpg", "paper.pdf", "clip.mpg"):
        (tmp_path / name).write_bytes(b"")
    assert [asked.id for asked in pictures(str(tmp_path), "x", None)] == ["a.png", "b[1].jpg"]
    one = str(tmp_path / "b[1].jpg")
    assert [asked.image for asked in pictures(one, "x", None)] == [one]
    masks = batch(tiny, tmp_path / "out", "--images", tmp_path, "--prompt", "x", "--masks", tmp_path)
    assert_one_line(masks, "is the directory of the images: give another one")


@pytest.mark.parametrize(
    "text", ['{"images": []}', '{"id": 1, "image": "a.png"}', '{"id": 1, "prompt": "x"', "photos"]
)
def test_a_file_of_somebody_else_is_kept(tiny, photos, tmp_path, text):
    """Also if its one line has no end, as a torn answer has none."""
    out = tmp_path / "out"
    out.write_text(text)
    begun = text.startswith('{"id": ') and not text.endswith("}")  # as a torn answer begins
    done = batch(tiny, out, "--images", photos, "--prompt", "x")
    assert done.code == (0 if begun else 1), done.err
    assert begun or out.read_text() == text


def test_answers_with_a_null_error_are_answers(tmp_path):
    """As Ray's write_json writes them."""
    out = jsonl(tmp_path / "out", [{"id": 1, "model": "m", "prompt": "x", "error": None}])
    with Output(str(out), "m") as output:
        assert output.answered(1, "x", "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_read_once(tiny, photos, tmp_path):
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    data = jsonl(tmp_path / "in.jsonl", questions(photos, 3)).read_bytes()
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    done = batch(tiny, out, "--jsonl", pipe)
    writer.join()
    assert done.code == 0, done.err
    assert set(told(out)) == {0, 1, 2}


# Resuming


def test_what_is_answered_is_not_computed_again(tiny, photos, tmp_path):
    out, source = tmp_path / "out.jsonl", jsonl(tmp_path / "in.jsonl", questions(photos))
    assert batch(tiny, out, "--jsonl", source).code == 0
    whole = out.read_bytes()
    done = batch("no/such/model", out, "--jsonl", source)  # refused because of the name of its model
    assert_one_line(done, "is an answer of the model")
    done = batch(tiny, out, "--jsonl", source)
    assert (done.code, done.err) == (0, f"{out} has all 12 answers\n")
    assert out.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    kept = lines[0].replace(b'"text": "', b'"text": "kept ')
    out.write_bytes(kept + b"".join(lines[1:9]) + lines[9][:-20])  # the last line is torn
    done = batch(tiny, out, "--jsonl", source)
    assert done.code == 0
    assert f"{out} has 9 of 12 answers" in done.err
    assert "3 rows in" in done.err
    assert out.read_bytes().startswith(kept + b"".join(lines[1:9]))
    assert sorted(out.read_bytes().splitlines()[9:]) == sorted(line.rstrip() for line in lines[9:])


def test_killed_at_random_moments(tiny, photos, tmp_path):
    """After each kill the file has whole lines, except perhaps the last; in the end, each answer once."""
    source, truth, out = (
        jsonl(tmp_path / "in.jsonl", questions(photos, 16 * KILLS)),
        tmp_path / "truth",
        tmp_path / "out",
    )
    args = ("--jsonl", source, "--batch-size", 3)
    start = time.monotonic()
    assert batch(tiny, truth, *args).code == 0
    seconds, generator, killed = time.monotonic() - start, random.Random(KILLS), 0
    for _ in range(KILLS):
        with Command(*arguments(tiny, out, *args), module="paligemma.batch") as command:
            lines = out.read_bytes().count(b"\n") if out.exists() else 0
            if generator.random() < 0.5:  # soon after a line is written
                more = lines + generator.randrange(1, 4)
                wait_for(
                    lambda more=more: out.exists() and out.read_bytes().count(b"\n") >= min(more, 16 * KILLS)
                )
            else:
                time.sleep(generator.random() * seconds)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(command.pid, signal.SIGKILL)
            killed += command.finish().code == -signal.SIGKILL
    assert killed
    assert batch(tiny, out, *args).code == 0
    assert told(out) == told(truth)
    assert sorted(out.read_bytes().splitlines()) == sorted(truth.read_bytes().splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(tiny, photos, tmp_path, number):
    source, out = jsonl(tmp_path / "in.jsonl", questions(photos, 4000)), tmp_path / "out.jsonl"
    with Command(*arguments(tiny, out, "--jsonl", source), module="paligemma.batch") as command:
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") > 2)
        os.kill(command.pid, number)
        done = command.finish()
    assert done.code == 130
    assert done.err.endswith("\ninterrupted\n")
    assert "Traceback" not in done.err
    assert 2 < len(told(out)) < 4000


def test_two_runs_on_one_output(tiny, photos, tmp_path):
    source, out = jsonl(tmp_path / "in.jsonl", questions(photos, 4000)), tmp_path / "out.jsonl"
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with Command(*arguments(tiny, out, "--jsonl", source), module="paligemma.batch") as command:
        wait_for(lambda: out.exists() and out.stat().st_size)
        for name in (out, link):  # in a new process: the server of `Command` runs one at a time
            shell = [
                sys.executable,
                "-m",
                "paligemma.batch",
                *map(str, arguments(tiny, name, "--jsonl", source)),
            ]
            done = subprocess.run(
                shell, cwd=ROOT, env=environment(), capture_output=True, timeout=120, check=False
            )
            refused = Finished(done.returncode, done.stdout, done.stderr.decode())
            assert_one_line(refused, f"another run is writing {name}")
        command.interrupt()
        assert command.finish().code == 130
    assert len(told(out)) > 0


SMALL = """if True:
    import resource, runpy, sys
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
    sys.argv = ["paligemma.batch", *sys.argv[2:]]
    runpy.run_module("paligemma.batch", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk(tiny, photos, tmp_path):
    """The limit is in the middle of a line: the lines before it stay, and one line on stderr says why."""
    source, out, truth = jsonl(tmp_path / "in.jsonl", questions(photos)), tmp_path / "out", tmp_path / "truth"
    assert batch(tiny, truth, "--jsonl", source).code == 0
    room = len(b"".join(truth.read_bytes().splitlines(keepends=True)[:4])) + 30
    args = map(str, arguments(tiny, out, "--jsonl", source))
    shell = [sys.executable, "-c", SMALL, str(room), *args]
    done = subprocess.run(shell, cwd=ROOT, env=environment(), capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error")]
    assert errors == ["error: [Errno 27] File too large"]
    assert b"Traceback" not in done.stderr
    assert 1 <= len(told(out)) <= 5
    assert batch(tiny, out, "--jsonl", source).code == 0
    assert told(out) == told(truth)


def test_a_line_that_cannot_be_written_whole_is_removed(tmp_path, monkeypatch):
    """Also if only a part of it was written, and if Ctrl-C comes between."""
    original = os.write
    with Output(str(tmp_path / "out"), "m") as output:
        output.write({"id": 1, "model": "m", "prompt": "x"})
        before = output.path.read_bytes()
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            given = []

            def write(file, data, error=error, given=given):
                given.append(data)
                if len(given) > 1:
                    raise error
                return original(file, data[:5])

            monkeypatch.setattr(os, "write", write)
            with pytest.raises(type(error)):
                output.write({"id": 2, "model": "m", "prompt": "x"})
            assert output.path.read_bytes() == before
        monkeypatch.setattr(os, "write", lambda file, data: original(file, data[:3]))
        output.write({"id": "\udcff", "model": "m", "prompt": "x"})
    assert list(told(output.path)) == [1, "\udcff"]
    with Output(str(tmp_path / "out"), "m") as output:
        assert output.answered("\udcff", "x", "a.png")
        assert not output.answered("2", "x", "a.png")


# Masks


@pytest.fixture(scope="module")
def masking(tmp_path_factory, tokenizer_model) -> Path:
    return write_npz(tmp_path_factory.mktemp("decoder") / "vae-oid.npz")


@pytest.mark.parametrize(
    "id", ["../../x", "/etc/x", "..", "a/../..\\b", "C:\\x", "x" * 400, "\0", "\udcff", 7, ""]
)
def test_masks_stay_in_the_directory(tmp_path, id):
    import numpy as np

    from paligemma.answers.parsing import Answer, Object

    soft = np.ones((64, 64), np.float32)
    found = [Object(label, (2, 3, 10, 12), None, (1,) * 16, soft, (20, 16), "") for label in ("a/../b", "")]
    directory = tmp_path / "deep" / "masks"
    directory.mkdir(parents=True)
    paths = save_masks(directory, id, Answer(list(found), (20, 16)))
    assert sorted(paths) == sorted(directory.iterdir())
    assert [path for path in tmp_path.rglob("*.png") if path.parent != directory] == []
    assert all(path.is_file() and len(path.name.encode()) <= 255 for path in paths)


def test_masks_of_different_ids_have_different_names(tmp_path):
    import numpy as np

    from paligemma.answers.parsing import Answer, Object

    o = Object("x", (2, 3, 10, 12), None, (1,) * 16, np.ones((64, 64), np.float32), (20, 16), "")
    ids = ["a/b", "a%2Fb", "a-b", "a", "a-00", "a+00", "a b", "x" * 300 + "a", "x" * 300 + "b", 1, 11]
    names = {save_masks(tmp_path, id, Answer([o], (20, 16)))[0] for id in ids}
    assert len(names) == len(ids)


# The pipeline


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_hf_model(tiny, dtype="float32", device="cpu")


def test_pictures_are_read_ahead_but_not_without_bound(loaded, photos, monkeypatch):
    """Of 200 questions, slots + threads are read before the first answer, and never more at a time."""
    model, processor = loaded
    at_work, most, lock, drawn = [], [], threading.Lock(), []
    original = Pipeline.prepare

    def prepare(self, question):
        with lock:
            at_work.append(question.id)
        return original(self, question)

    def source():
        for n in range(200):
            drawn.append(n)
            yield Question(n, photos / "00.png", "x")

    monkeypatch.setattr(Pipeline, "prepare", prepare)
    pipe = Pipeline(model, processor, 3, name="m", max_new_tokens=2, threads=2)
    for count, _ in enumerate(pipe.answers(source()), 1):
        most.append(len(drawn) - count)
    assert len(most) == 200
    assert len(at_work) == 200
    assert max(most) <= 3 + 3 + 2  # in the slots, and read ahead


def test_an_abandoned_run_leaves_nothing_behind(loaded, photos):
    model, processor = loaded
    pipe = Pipeline(model, processor, 3, name="m", max_new_tokens=9)
    first = pipe.answers(Question(n, photos / "00.png", "x") for n in range(50))
    next(first)
    first.close()
    second = list(pipe.answers(Question(f"b{n}", photos / "01.png", "x") for n in range(5)))
    assert sorted(line["id"] for line in second) == [f"b{n}" for n in range(5)]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("pictures")] == []


def test_the_default_size_follows_the_free_memory(loaded, monkeypatch):
    model, _ = loaded
    a_row = 512 * pipeline.position_bytes(model.config.text_config, model.dtype)
    for free, slots in ((10**12, 16), (4 * 5 * a_row, 5), (4 * a_row - 1, 1), (0, 1)):
        monkeypatch.setattr(pipeline, "free_bytes", lambda device, free=free: free)
        assert pipeline.choose_slots(model, 100) == slots


def test_more_rows_than_the_memory_has_room_for(tiny, monkeypatch):
    """The command says so before it reads a picture; a row alone that is too long is an error of its own."""
    monkeypatch.setattr("paligemma.rows.free_bytes", lambda device: 100)
    with pytest.raises(PaliGemmaError, match=r"the caches of 3 rows need .* free: take fewer rows"):
        pipeline.load_pipeline(tiny, 3, device="cpu")


def test_a_row_of_nan_does_not_touch_the_others(loaded, photos, monkeypatch):
    """Planted: a picture whose features overflow."""
    model, processor = loaded
    original = Pipeline.prepare

    def prepare(self, question):
        inputs, size = original(self, question)
        if question.id == 1:
            inputs["pixel_values"] = inputs["pixel_values"] + 3e38
        return inputs, size

    good = {q.id: q for q in (Question(n, photos / "03.png", PROMPTS[n]) for n in range(4))}
    truth = {told["id"]: told for told in Pipeline(model, processor, 4, name="m").answers(good.values())}
    monkeypatch.setattr(Pipeline, "prepare", prepare)
    found = {told["id"]: told for told in Pipeline(model, processor, 2, name="m").answers(good.values())}
    assert "overflow" in found[1]["error"]
    assert all(found[n]["text"] == truth[n]["text"] for n in (0, 2, 3))


def test_lines_are_read_one_at_a_time(tmp_path):
    source = jsonl(tmp_path / "in", [{"id": n, "image": "a", "prompt": "x"} for n in range(5)] + ["{"])
    lines = iter(Lines(str(source), None, None))
    assert [next(lines).id for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(PaliGemmaError, match="line 6"):
        next(lines)
    assert pictures(str(tmp_path / "i*"), "p", None)[0].prompt == "p"


def test_a_seed_is_that_of_every_row(loaded, photos):
    """What `generate --seed` gives, many times: the same picture and prompt have the same answer."""
    model, processor = loaded
    asked = [Question(n, photos / "04.png", "x", Sampling(1.0, 0.9, 5)) for n in range(5)]
    pipe = Pipeline(model, processor, 2, name="m", max_new_tokens=8)
    found = [told["text"] for told in pipe.answers(asked)]
    assert len(set(found)) == 1
