"""paligemma.ray in a Ray cluster of two workers on this machine, each with one CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, assert_one_line, environment, run
from conftest import photo

from paligemma import PaliGemmaError
from paligemma.cluster import share
from paligemma.ray import Generate, rows_of, to_record, to_table

pytest.importorskip("ray")
PROMPTS = ("caption en", "detect red circle", "segment x")
OPTIONS = {"model": "demo", "dtype": "float32", "device": "cpu", "max_new_tokens": 8, "seed": 3}
MODELS = 2  # workers


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A directory of eleven pictures and a torn one."""
    directory = tmp_path_factory.mktemp("photos")
    for n in range(11):
        photo(40 + 7 * n, 60 - 3 * n, seed=n).save(directory / f"{n:02}.png")
    (directory / "torn.png").write_bytes((directory / "00.png").read_bytes()[:200])
    return directory


def inputs(photos: Path) -> list[dict]:
    paths = sorted(str(path) for path in photos.iterdir())
    rows = [{"id": n, "image": path, "prompt": PROMPTS[n % 3]} for n, path in enumerate(paths)]
    rows[8]["image"] = [paths[8], paths[2]]
    return rows


@pytest.fixture(scope="module")
def batch(photos, tmp_path_factory) -> dict[int, dict]:
    """What `paligemma.batch` writes for the same rows."""
    directory = tmp_path_factory.mktemp("batch")
    source, out = directory / "in.jsonl", directory / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in inputs(photos)))
    done = run(*command(source, out), module="paligemma.batch")
    assert done.code == 1, done.err  # one row is torn
    return {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}


def same(found: dict, truth: dict) -> None:
    """The same record; probabilities differ by the rounding of the sums of other batch sizes."""
    assert list(found) == list(truth)
    for name in truth.keys() - {"objects", "log_probs"}:
        assert found[name] == truth[name]
    assert found.get("log_probs", []) == pytest.approx(truth.get("log_probs", []), abs=1e-4)
    for one, other in zip(found.get("objects", []), truth.get("objects", []), strict=True):
        assert one == {**other, "score": pytest.approx(other["score"], abs=1e-4)}


# Without Ray: the columns


@pytest.fixture(scope="module")
def generate() -> Generate:
    return Generate(**OPTIONS, slots=3, log_probs=True)


def records(table) -> dict:
    rows = [to_record(row) for row in table.to_pylist()]
    return {row["id"]: row for row in rows}


def test_a_batch_is_answered_as_the_command_does(generate, photos, batch):
    rows = inputs(photos)
    columns = {name: np.array([row[name] for row in rows], object) for name in rows[0]}
    table = generate(columns)
    assert table["id"].to_pylist() == list(range(12))  # the order of the batch
    assert [n for n, error in enumerate(table["error"].to_pylist()) if error] == [11]
    for id, record in records(table).items():
        same(record, batch[id])


@pytest.mark.parametrize("kind", ["bytes", "pixels", "path", "arrow"])
def test_every_kind_of_picture(generate, photos, batch, kind):
    import pyarrow as pa
    from PIL import Image

    path = photos / "00.png"
    columns: dict = {"path": [str(path)], "prompt": [None], "task": ["caption"], "temperature": [0.8]}
    if kind == "bytes":
        columns["bytes"] = [path.read_bytes()]
    if kind == "pixels":
        columns["image"] = np.asarray(Image.open(path))[None]
    given = pa.table(columns) if kind == "arrow" else columns
    (record,) = records(generate(given)).values()
    assert record["id"] == str(path)
    assert record["tokens"] == batch[0]["tokens"]
    assert record["text"] == batch[0]["text"]


def test_wrong_rows_are_errors_and_wrong_batches_are_raised(generate, photos):
    image = str(photos / "01.png")
    table = generate({
        "id": [1, 2, 3, 4, 5], "image": [image, None, image, image, image],
        "prompt": ["x", "x", None, "x", "cat"], "task": [None, None, None, "fly", "detect"],
        "temperature": [0.0, np.nan, 0.0, 0.0, -1.0],
    })  # fmt: skip
    errors = table["error"].to_pylist()
    assert errors[0] is None
    parts = ("NoneType", "neither prompt nor task", "fly", "temperature is -1.0")
    for error, part in zip(errors[1:], parts, strict=True):
        assert part in error
    with pytest.raises(PaliGemmaError, match="and none of id, path: the id is read there"):
        generate({"image": [image]})
    with pytest.raises(PaliGemmaError, match="and none of image, bytes, path"):
        generate({"id": [1]})
    with pytest.raises(PaliGemmaError, match="the batch is a list"):
        list(rows_of([1]))  # pyright: ignore
    with pytest.raises(PaliGemmaError, match="lang goes with task"):
        Generate("demo", lang="de")


def test_the_types_of_columns_do_not_depend_on_the_rows():
    """Otherwise Ray cannot join blocks."""
    error = to_table([{"id": 1, "error": "x"}], True)
    found = {"label": "a", "box": [1, 2, 3, 4], "score": None, "box_score": 0.5, "label_score": None}
    image = {"width": 1, "height": 2, "path": "a.png"}
    answer = {"id": 2, "model": "m", "image": image, "prompt": "p", "text": "t",
              "objects": [found, {**found, "mask": "m.png"}], "faults": [{"text": "a", "fault": "b"}],
              "finish_reason": "stop", "tokens": [1], "log_probs": [-0.5]}  # fmt: skip
    table = to_table([answer], True)
    assert table.schema == error.schema
    assert [json.dumps(to_record(row)) for row in table.to_pylist()] == [json.dumps(answer)]
    assert to_record(error.to_pylist()[0]) == {"id": 1, "error": "x"}
    sizes = [image, {"width": 3, "height": 4}]
    several = {"images" if name == "image" else name: value for name, value in answer.items()}
    several["images"] = sizes
    assert to_table([several], True).schema == error.schema
    assert to_record(to_table([several], True).to_pylist()[0]) == several


@pytest.mark.parametrize(("cpus", "workers", "each"), [
    ([2], 1, 2), ([2], 2, 1), ([8, 4], 2, 4), ([8, 4], 3, 4), ([8, 0], 1, 8), ([8, 4], 4, 2), ([3], 9, 1),
])  # fmt: skip
def test_workers_fit_on_their_machines(cpus, workers, each):
    """A worker that needs more CPUs than a machine has would never start."""
    assert share(cpus, workers) == each


# With Ray


@pytest.fixture(scope="module")
def ray():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        "local", num_cpus=MODELS, include_dashboard=False, object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def test_two_workers_one_of_which_is_killed(ray, photos, batch, tmp_path):
    """Planted: the worker that gets row 5 is killed, once. No row is lost, and none is there twice."""
    killed = tmp_path / "killed"

    class Fatal(Generate):
        def __call__(self, batch):
            if 5 in batch["id"] and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    rows = [{**row, "image": np.atleast_1d(row["image"]).tolist()} for row in inputs(photos)]  # of one type
    answered = ray.data.from_items(rows, override_num_blocks=6).map_batches(
        Fatal, fn_constructor_kwargs={**OPTIONS, "log_probs": True, "slots": 2},
        compute=ray.data.ActorPoolStrategy(size=MODELS), batch_size=2, num_cpus=1,
    ).materialize()  # fmt: skip
    assert killed.exists()
    rows = answered.take_all()
    assert sorted(row["id"] for row in rows) == list(range(12))
    for row in rows:
        same(to_record(row), batch[row["id"]])
    torn = next(row for row in rows if row["id"] == 11)
    assert "cannot be read as an image" in torn["error"]
    assert torn["text"] is None
    answered.write_json(str(tmp_path / "json"))
    lines = [line for path in (tmp_path / "json").iterdir() for line in path.read_text().splitlines()]
    assert sorted(json.loads(line)["id"] for line in lines) == list(range(12))
    for line in map(json.loads, lines):
        same(to_record(line), batch[line["id"]])


def command(source: Path, out: Path, *args: object) -> list[object]:
    options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", 8, "--seed", 3, "--log-probs"]
    return ["--model", "demo", "--jsonl", source, "--out", out, *options, *args]


def test_the_command_with_a_cluster(ray, photos, batch, tmp_path):
    """It goes on with an output that was begun without Ray."""
    rows, out = inputs(photos), tmp_path / "out.jsonl"
    few, source = tmp_path / "few.jsonl", tmp_path / "in.jsonl"
    for path, count in ((few, 4), (source, 12)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
    assert run(*command(few, out), module="paligemma.batch").code == 0
    begun = out.read_bytes()
    address = ray.get_runtime_context().gcs_address
    args = command(source, out, "--ray", address, "--ray-workers", MODELS, "--batch-size", 2)
    done = run(*args, module="paligemma.batch")
    assert (done.code, done.out) == (1, b""), done.err
    for part in ("has 4 of 12 answers", "2 workers on 1 machines, 1 CPUs each", "1 of 8 rows failed"):
        assert part in done.err
    assert "Traceback" not in done.err
    assert out.read_bytes().startswith(begun)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(12))
    for line in lines:
        same(line, batch[line["id"]])
    args = command(source, tmp_path / "many", "--ray", address, "--ray-workers", 9)
    many = run(*args, module="paligemma.batch").err.splitlines()[-1]
    assert many == "error: --ray-workers 9: the cluster has 2 CPUs, and a worker takes one at least"
    source.write_text(json.dumps(rows[0]) + "\n")
    args = ["--model", tmp_path, "--jsonl", source, "--out", tmp_path / "other", "--ray", address]
    refused = run(*args, "--device", "cpu", module="paligemma.batch")
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith("error: ")
    assert "has no config.json" in refused.err.splitlines()[-1]
    assert "Traceback" not in refused.err


@pytest.mark.parametrize(("address", "part"), [
    ("127.0.0.1:1", "no Ray cluster answers there"), ("nonsense", "Invalid address format: nonsense"),
])  # fmt: skip
def test_no_cluster(photos, tmp_path, address, part):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(inputs(photos)[0]) + "\n")
    done = run(*command(source, tmp_path / "out", "--ray", address), module="paligemma.batch")
    assert_one_line(done, f"--ray {address}: ", part)


WITHOUT = """if True:
    import runpy, sys
    sys.modules["ray"] = None  # an import of it fails
    runpy.run_module("paligemma.batch", run_name="__main__", alter_sys=True)
"""


def test_without_ray(photos, tmp_path):
    """One line says how to install it; what does not need it works."""
    args = map(str, ["--model", "demo", "--images", photos, "--prompt", "x", "--out", tmp_path / "out"])
    shell = [sys.executable, "-c", WITHOUT, *args]
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "check": False}
    done = subprocess.run([*shell, "--ray", "local"], **options)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --ray needs Ray Data, which cannot be imported")
    assert done.stderr.endswith(": pip install 'paligemma[ray]'\n")
    assert subprocess.run([*shell, "--help"], **options).returncode == 0


def test_the_package_does_not_import_ray():
    code = "import sys, paligemma, paligemma.batch, paligemma.ray; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
