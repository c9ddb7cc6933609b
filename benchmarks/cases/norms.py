"""layer_norm and rms_norm, and the same after the addition of two inputs: add_layer_norm and add_rms_norm."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.kernels.layer_norm import add_layer_norm, layer_norm
from paligemma.kernels.rms_norm import add_rms_norm, rms_norm

from .case import Case, compiled

EPS = 1e-6


def norm_case(kernel: str, label: str, E: int, rows: int) -> Case:
    adds, has_bias = kernel.startswith("add_"), kernel.endswith("layer_norm")

    def make(device, dtype):
        inputs = [torch.randn(rows, E, device=device, dtype=dtype) for _ in range(1 + adds)]
        # SigLIP's weights have a mean of 1, Gemma's of 0
        weight = 0.3 * torch.randn(E, device=device, dtype=dtype) + has_bias
        return (*inputs, weight, *([torch.randn(E, device=device, dtype=dtype)] if has_bias else []))

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain)}
    plain = partial(plain_layer_norm if has_bias else plain_rms_norm, adds)
    if find_spec("liger_kernel") and kernel != "add_layer_norm":
        peers["Liger-Kernel"] = {
            "rms_norm": liger_rms_norm, "add_rms_norm": liger_add_rms_norm, "layer_norm": liger_layer_norm
        }[kernel]  # fmt: skip
    return Case(
        kernel, f"{label}{rows} x {E}", f"E {E}", make, partial(run_norm, kernel), plain,
        partial(exact_norm, adds, has_bias),
        lambda itemsize: itemsize * E * (rows * (4 if adds else 2) + 1 + has_bias),
        peers=peers, weights=lambda *inputs: inputs[1 + adds :],
    )  # fmt: skip


def run_norm(kernel: str, *inputs: Tensor):
    launchers: dict[str, Callable] = {
        "rms_norm": rms_norm, "add_rms_norm": add_rms_norm,
        "layer_norm": layer_norm, "add_layer_norm": add_layer_norm,
    }  # fmt: skip
    return launchers[kernel](*inputs, EPS)


def plain_rms_norm(adds: bool, *inputs: Tensor):
    *terms, weight = inputs
    x = terms[0] + terms[1] if adds else terms[0]
    return (plain_norm(x, weight), x) if adds else plain_norm(x, weight)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + EPS)
    return (h * (1 + weight.float())).to(x.dtype)


def plain_layer_norm(adds: bool, *inputs: Tensor):
    *terms, weight, bias = inputs
    x = terms[0] + terms[1] if adds else terms[0]
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    return (y, x) if adds else y


def exact_norm(adds: bool, has_bias: bool, *inputs: Tensor):
    wide = [x.double() for x in inputs]
    x = wide[0] + wide[1] if adds else wide[0]
    weight = wide[1 + adds]
    if has_bias:
        centred = x - x.mean(dim=-1, keepdim=True)
        y = centred / (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight + wide[2 + adds]
    else:
        y = exact_rms_norm(x, weight)
    return (y, x) if adds else y


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * (1 + weight.double())


def liger_rms_norm():
    from liger_kernel.ops.rms_norm import rms_norm_forward  # pyright: ignore[reportMissingImports]

    return lambda x, weight: rms_norm_forward(x, weight, EPS, 1.0, "gemma", None)[0]


def liger_add_rms_norm():
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward  # pyright: ignore[reportMissingImports]

    return lambda x, residual, weight: fused_add_rms_norm_forward(x, residual, weight, EPS, 1.0, "gemma")[:2]


def liger_layer_norm():
    from liger_kernel.ops.layer_norm import layer_norm_forward  # pyright: ignore[reportMissingImports]

    return lambda x, weight, bias: layer_norm_forward(x, weight, bias, EPS)[0]
