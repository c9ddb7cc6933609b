"""The package as it is installed: a wheel that holds what it needs and nothing else, and works from any
directory."""

import json
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Directory with a wheel and an sdist, built from the files that git would check out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = [name for name in tracked.stdout.split("\0") if name and (ROOT / name).exists()]
    archive = source / "tree.tar"
    subprocess.run(["tar", "-cf", archive, "-C", ROOT, *names], check=True)
    subprocess.run(["tar", "-xf", archive, "-C", source], check=True)
    archive.unlink()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        check=True,
        capture_output=True,
    )
    return out


def test_the_wheel_holds_both_models_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "paligemma/generate.py",
        "paligemma/compare.py",
        "paligemma/reference/model.py",
        "paligemma/kernels/rope.py",
    } <= set(names)
    # A top-level `kernels` or `reference` would collide with other distributions of that name.
    assert {name.split("/")[0] for name in names} == {"paligemma", "paligemma-0.1.0.dist-info"}


def test_the_sdist_can_be_built_again(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "paligemma/generate.py",
        "paligemma/reference/model.py",
        "paligemma/kernels/rope.py",
    } <= names


def test_the_wheel_runs_from_an_empty_directory(built, tmp_path, tiny, image_file):
    (wheel,) = built.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path / "site",
            wheel,
        ],
        check=True,
    )
    code = "import paligemma; print(paligemma.__file__); from paligemma import reference; print(reference.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    empty = tmp_path / "empty"
    empty.mkdir()
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert all(path.startswith(str(tmp_path / "site")) for path in where)
    command = [
        sys.executable,
        "-m",
        "paligemma.generate",
        "--model",
        tiny,
        "--image",
        image_file,
        "--prompt",
        "a cat",
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(
        [*command, "--backend", "reference"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_demo_answers_from_the_wheel(built, tmp_path):
    """Nothing but the wheel's own files, in an empty directory and without a network."""
    (wheel,) = built.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path / "site",
            wheel,
        ],
        check=True,
    )
    samples = tmp_path / "site" / "paligemma" / "demo" / "samples"
    told = json.loads((samples / "answers.json").read_text())
    (name, prompts) = next(iter(told.items()))
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    empty = tmp_path / "empty"
    empty.mkdir()
    for prompt in ("caption en", "detect red circle"):
        command = [
            sys.executable,
            "-m",
            "paligemma.generate",
            "--model",
            "demo",
            "--image",
            samples / name,
            "--prompt",
            prompt,
            "--no-sample",
        ]
        done = subprocess.run(
            command, cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout == f"{prompts[prompt]}\n", done.stderr


def test_links_are_relative_and_lead_to_the_folders():
    for name in ("reference", "kernels"):
        assert (ROOT / "paligemma" / name).is_symlink()
        assert (ROOT / "paligemma" / name).readlink().as_posix() == f"../{name}"


def test_the_kernels_folder_is_no_package_of_its_own():
    """With an __init__.py in it, `import transformers` from a checkout would take it for the distribution
    `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
