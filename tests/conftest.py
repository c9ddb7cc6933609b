"""Shared fixtures: a tokenizer, a small checkpoint and an image made for the run, and Google's test data."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may use the network
# With PALIGEMMA_TEST_DEVICE=cuda, tests of kernels and graphs run on a GPU. All others are for a CPU.
if os.environ.get("PALIGEMMA_TEST_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hides a GPU of the machine
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter runs the kernels on the CPU
for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # two threads slow down products as small as these
    os.environ.setdefault(pool, "1")

import interpreter
import numpy as np
import pytest
from checkpoints import train_tokenizer, write_checkpoint
from PIL import Image

interpreter.install()
if "WIDE_VECTORS" in os.environ:
    import wide_vectors  # noqa: F401

ROOT = Path(__file__).parent.parent
TEST_DATA = os.environ.get("PALIGEMMA_TEST_DATA")


def data(name: str) -> Path:
    """A file or directory of the test data, which is not in the repository. Skips the test if there is none.

    Continuous integration must have the test data.
    """
    if not TEST_DATA and not os.environ.get("CI"):
        pytest.skip(f"needs {name} of the test data: set PALIGEMMA_TEST_DATA to its directory")
    path = Path(TEST_DATA or "") / name
    assert path.exists(), f"{path} is missing"
    return path


@pytest.fixture(scope="session")
def tokenizer_model() -> bytes:
    return train_tokenizer()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer_model) -> Path:
    """The directory of a small float32 checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", tokenizer_model)


@pytest.fixture(scope="session")
def image_file(tmp_path_factory) -> Path:
    """A small PNG, wider than it is high."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    photo(90, 60).save(path)
    return path


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image like a photograph: smooth, with edges and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    smooth = np.stack([np.sin(rng.uniform(3, 9) * x + rng.uniform(3, 9) * y + i) for i in range(3)], axis=-1)
    edges = ((x * 7).astype(int) + (y * 5).astype(int)) % 2 * 40.0
    values = 128 + 70 * smooth + edges[..., None] + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
