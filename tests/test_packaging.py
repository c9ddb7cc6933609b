"""The installed package: a wheel that contains the files that it needs and no others, and works from any
directory."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def run(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=check, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with a wheel and an sdist, built from the files that git would check out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()]
    archive = source / "tree.tar"
    run("tar", "-cf", archive, "-C", ROOT, *names)
    run("tar", "-xf", archive, "-C", source)
    archive.unlink()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


@pytest.fixture
def installed(built, tmp_path) -> dict:
    """The options of a process in an empty directory, without a network, that has only the wheel and its
    dependencies."""
    (wheel,), site, empty = built.glob("*.whl"), tmp_path / "site", tmp_path / "empty"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
    empty.mkdir()
    return {"cwd": empty, "env": {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}}


FILES = {"paligemma/generate.py", "paligemma/reference/model.py", "paligemma/kernels/rope.py"}


def test_the_wheel_holds_both_models_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert FILES | {"paligemma/compare.py"} <= set(names)
    static = "paligemma/serving/static"
    page = {f"{static}/{path.name}" for path in (ROOT / static).iterdir()}
    assert {f"{static}/index.html", f"{static}/page.js"} <= page <= set(names)
    # A top-level `kernels` or `reference` would collide with other distributions of that name.
    assert {name.split("/")[0] for name in names} == {"paligemma", "paligemma-0.1.0.dist-info"}


def test_the_sdist_can_be_built_again(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert FILES | {"pyproject.toml", "LICENSE", "README.md"} <= names


GENERATE = (sys.executable, "-m", "paligemma.generate")


def test_the_wheel_runs_from_an_empty_directory(installed, tiny, image_file):
    code = "import paligemma; from paligemma import reference; print(paligemma.__file__, reference.__file__)"
    where = run(sys.executable, "-c", code, **installed).stdout.split()
    assert len(where) == 2
    assert all(path.startswith(installed["env"]["PYTHONPATH"]) for path in where)
    options = ("--model", tiny, "--image", image_file, "--prompt", "a cat", "--max-new-tokens", "3")
    done = run(*GENERATE, *options, "--backend", "reference", check=False, **installed)
    assert done.returncode == 0, done.stderr


def test_the_demo_answers_from_the_wheel(installed):
    """The wheel contains the demo model and its samples."""
    samples = Path(installed["env"]["PYTHONPATH"]) / "paligemma" / "demo" / "samples"
    told = json.loads((samples / "answers.json").read_text())
    name, prompts = next(iter(told.items()))
    for prompt in ("caption en", "detect red circle"):
        options = ("--model", "demo", "--image", samples / name, "--prompt", prompt, "--no-sample")
        done = run(*GENERATE, *options, check=False, **installed)
        assert done.stdout == f"{prompts[prompt]}\n", done.stderr


def test_links_are_relative_paths_to_the_folders():
    for name in ("reference", "kernels"):
        assert (ROOT / "paligemma" / name).is_symlink()
        assert (ROOT / "paligemma" / name).readlink().as_posix() == f"../{name}"


def test_the_kernels_folder_is_not_a_package():
    """If it had an __init__.py, `import transformers` in a checkout would mistake it for the distribution
    `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
