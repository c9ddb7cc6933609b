"""README and docs/: every command and every snippet runs, and the target of every link exists."""

import argparse
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from masks import write_npz
from PIL import Image

from paligemma import demo, quantize

NAMES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "benchmarks/results/README.md")
FILES = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(sh|python)$\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(path, kind, code) for path in FILES for kind, code in BLOCK.findall(path.read_text())]
ELSEWHERE = r"python3 -m venv|pip install|python -m pytest|ruff |pyright"  # .ci/run runs these
# commands that have tests of their own
LONG = (
    "demo.train", "benchmarks.measure", "benchmarks.whole_model", "benchmarks.random_checkpoint",
    "benchmarks.peers", "paligemma.serve", "benchmarks.serve",
)  # fmt: skip


def commands() -> list[str]:
    """Each command of a shell block, without the folder of its python."""
    blocks = [code.replace("\\\n", "") for _, kind, code in BLOCKS if kind == "sh"]
    lines = [part.strip() for code in blocks for line in code.splitlines() for part in line.split("&&")]
    return [re.sub(r"^\.venv/bin/", "", line).split("  #")[0] for line in dict.fromkeys(lines) if line]


RUN = [command for command in commands() if not re.match(ELSEWHERE, command)]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current directory, with the files that the documentation names."""
    monkeypatch.chdir(tmp_path)
    image = Image.open(demo.SAMPLES / "shapes.png").convert("RGB")
    for name in ("photo.jpg", "a.jpg", "b.png"):
        image.save(tmp_path / name)
    with av.open("clip.mp4", "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame.from_image(image.resize((64, 48)))
        clip.mux([packet for _ in range(9) for packet in stream.encode(frame)] + stream.encode())
    for name in ("benchmarks", "paligemma"):
        (tmp_path / name).symlink_to(ROOT / name)
    box = {"label": "cat", "box": [10, 20, 60, 80], "score": 0.9}
    size = {"width": image.width, "height": image.height}
    row = {"id": "a.jpg", "image": size, "text": "a cat", "objects": [box]}
    truth = {
        "images": [{"id": 1, "file_name": "a.jpg", **size}], "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [10, 20, 50, 60]}],
    }  # fmt: skip
    texts = {"id": "a.jpg", "answers": ["a cat"]}
    for name, value in (("out.jsonl", row), ("annotations.json", truth), ("truth.jsonl", texts)):
        (tmp_path / name).write_text(json.dumps(value) + "\n")
    return tmp_path


def parsed(parser: argparse.ArgumentParser, *args, parse=argparse.ArgumentParser.parse_args, **options):
    parse(parser, *args, **options)
    raise SystemExit("parsed")


@pytest.mark.parametrize("line", RUN)
def test_a_command_runs(line, here, monkeypatch, capsys):
    python, flag, module, *args = shlex.split(line)
    assert (python.rstrip("3"), flag) == ("python", "-m")
    # Files of the 3B model: test_adapters.py and test_npz.py run such commands with small ones.
    large = "--adapter" in args or any(arg.endswith(".npz") for arg in args)
    small = dict.fromkeys(("google/paligemma-3b-mix-224", "checkpoints/random-3b"), "demo")
    small["DIR"] = str(demo.CHECKPOINT)
    if "--model paligemma-int4" in line:  # the command before it wrote this
        quantize.main(["demo", "paligemma-int4", "--quantize", "int4"])
        capsys.readouterr()
    args = [small.get(arg, arg) for arg in args]
    args += ["--max-new-tokens", "4"] if module == "paligemma.generate" and "--no-sample" not in args else []
    args += ["--out", "plot.svg"] if module == "benchmarks.plot" else []
    monkeypatch.setattr(sys, "argv", [module, *args])
    package = (ROOT / module.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{module}.__main__" if package else module).main
    if large or module.endswith(LONG):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        with pytest.raises(SystemExit, match="parsed"):
            main()
        return
    assert main() == 0
    printed = capsys.readouterr().out
    if "detect red circle" in line:
        told = re.search(r"^prints `(.*?)`", (ROOT / "README.md").read_text(), re.MULTILINE)
        assert printed == told[1] + "\n"
    assert printed or module in ("benchmarks.plot", "paligemma.batch")  # these write files


WITH_SNIPPETS = dict.fromkeys(path for path, kind, _ in BLOCKS if kind == "python")


@pytest.mark.parametrize("path", WITH_SNIPPETS, ids=lambda path: path.name)
def test_the_snippets_of_a_file_run_one_after_another(path, here):
    decoder = write_npz(here / "vae-oid.npz")
    names = {"DIR": demo.CHECKPOINT, "prompt": "caption en", "image": "a.jpg"}
    for file, kind, code in BLOCKS:
        if (file, kind) == (path, "python"):
            code = code.replace("google/paligemma-3b-mix-224", "demo").replace('"cuda"', '"cpu"')
            code = code.replace("MaskDecoder.load()", f"MaskDecoder.load({str(decoder)!r})")
            exec(compile(code, str(path), "exec"), names)
    if path.name == "README.md":
        assert len(names["answers"]) == 2
        assert (here / "out.png").exists()
    elif path.name == "evaluate.md":
        assert names["found"].xyxy.tolist() == [[10, 20, 60, 80]]
    else:
        assert len(names["own"].keys() & names["truth"].keys()) > 50
        assert np.abs(names["truth"]["logits"] - names["own"]["logits"]).max() < 1e-3


def test_the_older_places_of_documented_names():
    from paligemma.draw import draw
    from paligemma.mask_decoder import MaskDecoder
    from paligemma.processor import open_image

    assert (draw.__name__, MaskDecoder.__name__, open_image.__name__) == ("draw", "MaskDecoder", "open_image")


def test_the_targets_of_links_exist():
    LINK = re.compile(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"")
    links = [(path, "".join(link)) for path in FILES for link in LINK.findall(path.read_text())]
    targets = [(path, link) for path, link in links if not link.startswith("http")]
    assert len(targets) > 15
    assert [(path.name, link) for path, link in targets if not (path.parent / link).exists()] == []


def test_results_are_listed():
    listed = (ROOT / "benchmarks/results/README.md").read_text()
    names = [path.name for path in (ROOT / "benchmarks/results").glob("*.json")]
    assert [name for name in names if f"({name})" not in listed] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
