"""pytest benchmarks: on a GPU if there is one, otherwise in Triton's interpreter."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
    importlib.import_module("interpreter").install()  # makes the interpreter correct in bfloat16


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """The limits of this machine, measured once in this session."""
    from benchmarks.timing import ceilings

    return ceilings("cuda" if torch.cuda.is_available() else "cpu")
