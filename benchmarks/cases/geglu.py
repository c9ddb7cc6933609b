"""geglu: gelu(gate) * up."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.kernels.geglu import geglu

from .case import Case, compiled


def geglu_case(shape: str, rows: int, M: int) -> Case:
    def make(device, dtype):
        return tuple(torch.randn(rows, M, device=device, dtype=dtype) for _ in range(2))

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain_geglu)}
    if find_spec("liger_kernel"):
        peers["Liger-Kernel"] = liger_geglu
    return Case(
        "geglu", shape, "", make, geglu, plain_geglu, exact_geglu, lambda itemsize: 3 * itemsize * rows * M,
        peers=peers,
    )  # fmt: skip


def plain_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def exact_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return plain_geglu(gate.double(), up.double())


def liger_geglu():
    from liger_kernel.ops.geglu import geglu_forward  # pyright: ignore[reportMissingImports]

    return lambda gate, up: geglu_forward(gate, up)[-1]
