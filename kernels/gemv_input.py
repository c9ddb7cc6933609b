"""The input of the product in gemv.py, and the checks of what its kernels assume."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

MOST_ROWS = 16


class GemvInput(NamedTuple):
    """x, or the sum x + norm'(branch) with `post` as the weight of norm'; then the norm of that, if `norm` is
    its weight."""

    x: Tensor  # (R, K)
    branch: Tensor | None = None  # (R, K)
    post: Tensor | None = None  # (K,)
    norm: Tensor | None = None  # (K,)
    eps: float = 0.0
    squares: Tensor | None = None  # (R, parts) float32, parts of the sum of squares of each row of the branch

    def check(self, weight: Tensor, scale: Tensor | None) -> None:
        """Assert that the product with weight (N, K), and scale (N,) if it is 8-bit, can be computed."""
        R, K = self.x.shape
        assert 1 <= R <= MOST_ROWS, f"{R} rows"
        assert (self.branch is None) == (self.post is None) == (self.squares is None)
        assert self.branch is None or self.branch.shape == (R, K)
        if self.squares is not None:
            assert self.squares.shape[:1] == (R,)
            assert self.squares.dtype == torch.float32
            assert self.squares.is_contiguous()
        assert all(x is None or x.shape == (K,) for x in (self.post, self.norm))
        given = [x for x in self[:4] if x is not None]
        assert all(x.dtype == self.x.dtype and x.device == weight.device and x.is_contiguous() for x in given)
        assert weight.shape[1:] == (K,), f"weight {tuple(weight.shape)} for {K} features"
        assert weight.is_contiguous()
        assert weight.dtype in ((self.x.dtype,) if scale is None else (torch.int8, torch.float8_e4m3fn))
        assert scale is None or (scale.shape == weight.shape[:1] and scale.is_contiguous())

    @property
    def parts(self) -> dict[str, int]:
        """The constants of `gemv` for the parts of the sums of squares."""
        parts = 0 if self.squares is None else self.squares.shape[1]
        return {"PARTS": parts, "BLOCK_PARTS": triton.next_power_of_2(max(parts, 1))}
