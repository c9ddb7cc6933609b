"""Shared by the cases of the four products of a decode: the few rows, the norm before the product, and the
weight, which may be quantized."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.int4 import dequantized
from paligemma.kernels.gemv_input import GemvInput
from paligemma.layers import QUANTIZED

from .norms import EPS, exact_rms_norm, plain_norm


class Products(NamedTuple):
    """One product. Its inputs, in this order: x (R, E); if `post`, a branch (R, E), the weight of its norm
    (E,) and its sums of squares (R, parts); if `normed`, the weight of the norm (E,); the weight (N, E); if
    `quantize`, its scale (N,); then the inputs that only some kernels take."""

    R: int
    E: int  # input features
    N: int  # outputs
    post: bool  # whether the kernel first adds a normalised branch to x
    quantize: str | None
    normed: bool = True

    @property
    def variant(self) -> str:
        kind = " sum" * self.post + (f" {self.quantize}" if self.quantize else "")
        return f"{self.E} to {self.N} rows {self.R}{kind}"

    @property
    def chip(self) -> int:
        return 89 if self.quantize == "fp8" else 80

    def make(self, device, dtype) -> list[Tensor]:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, device=device, dtype=dtype)

        inputs = [normal(self.R, self.E)]
        if self.post:  # project_add also returns a sum of squares for each block of about 4 outputs
            branch = normal(self.R, self.E)
            parts = [part.sum(dim=1) for part in branch.float().square().tensor_split(-(-self.E // 4), dim=1)]
            inputs += [branch, normal(self.E, scale=0.3), torch.stack(parts, dim=1)]
        inputs += [normal(self.E, scale=0.3)] if self.normed else []
        if self.quantize is None:
            return [*inputs, normal(self.N, self.E, scale=self.E**-0.5)]
        if self.quantize == "int4":
            words = torch.randint(
                -(1 << 31), 1 << 31, (self.N, self.E // 8), device=device, dtype=torch.int32
            )
            scale = torch.randn(self.N, self.E // 32, device=device) / 4.6 / self.E**0.5  # of either sign
            return [*inputs, words, scale.bfloat16()]
        largest = {"int8": 127, "fp8": 448}[self.quantize]
        scale = torch.rand(self.N, device=device, dtype=dtype) * 2 / largest / self.E**0.5
        scale = scale + torch.finfo(dtype).tiny
        weight = normal(self.N, self.E, scale=largest / 3).clamp_(-largest, largest)
        return [*inputs, weight.to(QUANTIZED[self.quantize]), scale]

    def read(self, *inputs: Tensor) -> tuple[GemvInput, Tensor, Tensor | None, list[Tensor]]:
        """The rows, the weight (N, E), its scale (N,) or None, and the rest of the inputs."""
        rest = list(inputs)
        x = rest.pop(0)
        branch, post, squares = (rest.pop(0) if self.post else None for _ in range(3))
        rows = GemvInput(x, branch, post, rest.pop(0) if self.normed else None, EPS, squares)
        return rows, rest.pop(0), rest.pop(0) if self.quantize else None, rest

    def weights(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale, _ = self.read(*inputs)
        return rows.post, rows.norm, weight, scale

    def plain(self, *inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The outputs (R, N), x or its sum with the branch (R, E), and the rest of the inputs."""
        rows, weight, scale, rest = self.read(*inputs)
        x = rows.x
        if rows.branch is not None and rows.post is not None:
            x = x + plain_norm(rows.branch, rows.post)
        z = x if rows.norm is None else plain_norm(x, rows.norm)
        if scale is None:
            return F.linear(z, weight), x, rest
        if self.quantize == "int4":
            return F.linear(z.float(), dequantized(weight, scale)).to(x.dtype), x, rest
        return F.linear(z, weight.to(x.dtype)) * scale, x, rest

    def exact(self, *inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The same in float64, except that the sum is rounded to the dtype of the inputs, as the kernel
        stores it."""
        rows, weight, scale, rest = self.read(*inputs)
        x = rows.x.double()
        if rows.branch is not None and rows.post is not None:
            x = (x + exact_rms_norm(rows.branch, rows.post)).to(rows.x.dtype).double()
        z = x if rows.norm is None else exact_rms_norm(x, rows.norm)
        if scale is not None and self.quantize == "int4":
            return z @ dequantized(weight, scale).double().T, x, rest
        # in blocks, because the whole head in float64 takes 4 to 9 GB
        blocks = [z @ part.double().T for part in weight.split(1 << 14)]
        return torch.cat(blocks, dim=-1) * (1 if scale is None else scale.double()), x, rest

    def bytes(self, itemsize: int, outputs: int) -> int:
        of_row = {None: self.E * itemsize, "int4": self.E // 2 + self.E // 16}.get(
            self.quantize, self.E + itemsize
        )
        weight = self.N * of_row
        return weight + itemsize * self.R * (self.E * (1 + 2 * self.post) + outputs)
