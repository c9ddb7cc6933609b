"""The rule of accuracy, as paligemma.compare applies it. The truth is the reference in float64.

The RMS error is at most twice that of the reference's formulas in the same dtype, and the largest error is at
most four times theirs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from paligemma.compare import compare
from paligemma.reference.params import ARITHMETIC, Params

DEVICE = torch.device(os.environ.get("PALIGEMMA_TEST_DEVICE", "cpu"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Given(Params):
    """Parameters from a test instead of a checkpoint."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __getitem__(self, leaf: str) -> np.ndarray:
        return np.asarray(self.arrays[leaf], ARITHMETIC[self.dtype][0])

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.arrays

    def rows(self, leaf: str, rows: np.ndarray) -> np.ndarray:
        return self[leaf][rows]


def given(**arrays: np.ndarray) -> Given:
    return Given({}, "float64", arrays=arrays)


def random(seed: int, *shape: int, dtype: str = "float64", scale: float = 1.0) -> np.ndarray:
    """Normal random numbers that `dtype` represents exactly, as float64."""
    x = (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)
    rounded = ARITHMETIC[dtype][1]
    return (rounded(x) if rounded else x).astype(np.float64)


def tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).to(DEVICE, DTYPES[dtype])


def arithmetic(x: np.ndarray, p: Params) -> np.ndarray:
    """x in the dtype in which the reference computes with the parameters p."""
    return np.asarray(x, ARITHMETIC[p.dtype][0])


def check(value: torch.Tensor, formula: Callable, p: Given, dtype: str, plain: torch.Tensor | None = None):
    """Check `value`, computed in `dtype`, against the reference's formula(p), in float64 and in `dtype`.

    For a kernel that sums in blocks, pass torch's result in `dtype` as `plain`: it is enough if the error of
    `value` keeps the rule against the error of formula(p) or against that of `plain`.
    """
    truth = formula(p)
    yardsticks = [formula(replace(p, dtype=dtype)), *([] if plain is None else [plain.float().cpu().numpy()])]
    assert value.shape == truth.shape
    lines = [compare("", value.float().cpu().numpy(), truth, yardstick, dtype) for yardstick in yardsticks]
    rms = [f"relative RMS {x.rms:.2e} (allowed {x.rms_allowed:.2e})" for x in lines]
    maxima = [f"maximum {x.max:.2e} (allowed {x.max_allowed:.2e})" for x in lines]
    report = "; ".join(f"{x}, {y}" for x, y in zip(rms, maxima, strict=True))
    assert not all(line.exceeds for line in lines), report
