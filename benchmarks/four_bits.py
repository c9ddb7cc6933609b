"""Ways to round a weight to 4 bits, and the error of each: root mean square, relative to the weight.

All compute the numbers that stand for a weight (N, K). Scales and offsets are rounded to 16 bits, as they
would be stored."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from paligemma import int4, load_hf_model

from .random_checkpoint import with_outliers

INSTALL = "pip install torchao"
ROWS, FEATURES = 256, 2048


def least_squares(weight: Tensor) -> Tensor:
    return int4.dequantized(*int4.quantized_groups(weight))


def nearest(weight: Tensor) -> Tensor:
    """The plain rule: the scale is the largest magnitude of a group / 7, and each number is rounded."""
    groups = weight.view(-1, int4.GROUP)
    scale = (groups.abs().amax(dim=1, keepdim=True) / 7).bfloat16().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def q4_0(weight: Tensor) -> Tensor:
    """The rule of llama.cpp's Q4_0: the extreme of a group gets the code -8; the scale is float16."""
    groups = weight.view(-1, 32)
    scale = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True)) / -8
    codes = (groups / scale + 8.5).floor().clamp(0, 15)
    return ((codes - 8) * scale.half().float()).view_as(weight)


def groups_of_64(weight: Tensor) -> Tensor:
    """The search of int4.py, with one scale for 64 numbers."""
    groups = weight.view(-1, 64)
    codes, scale = int4.least_squares(groups)
    return ((codes.float() - int4.ZERO) * scale.float()[:, None]).view_as(weight)


def affine(weight: Tensor, group: int = 64) -> Tensor:
    """code * scale + offset: of codes that a range, shrunk step by step, gives, those whose best scale and
    offset leave the least error. Groups of 64 take as many bits as groups of 32 without an offset."""
    groups = weight.view(-1, group)
    least, most = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    best, found = torch.full_like(least, torch.inf), torch.zeros_like(groups)
    middle = groups.mean(dim=1, keepdim=True)
    for shrunk in torch.linspace(0.65, 1.05, 9).tolist():
        for low, high in ((least * shrunk, most * shrunk), (least * shrunk, most), (least, most * shrunk)):
            codes = ((groups - low) / (high - low) * 15).round().clamp(0, 15)
            centred = codes - codes.mean(dim=1, keepdim=True)
            slope = (centred * (groups - middle)).sum(dim=1, keepdim=True) / centred.square().sum(1, True)
            scale = slope.bfloat16().float()
            offset = (middle - scale * codes.mean(dim=1, keepdim=True)).bfloat16().float()
            numbers = ((groups - offset) / scale).round().clamp(0, 15) * scale + offset
            error = (numbers - groups).square().sum(dim=1, keepdim=True)
            found, best = torch.where(error < best, numbers, found), torch.minimum(error, best)
    return found.view_as(weight)


def torchao(weight: Tensor, group: int, algorithm: str) -> Tensor:
    """torchao's int4 weights for a CPU: codes with a scale and an offset. Its product with the rows of a unit
    matrix gives the numbers, in bfloat16."""
    from torchao.prototype.quantization.int4 import (  # pyright: ignore[reportMissingImports]
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
    kind: type = PrototypeInt4WeightOnlyConfig
    quantize_(linear, kind(group_size=group, int4_choose_qparams_algorithm=algorithm))
    return linear(torch.eye(weight.shape[1], dtype=torch.bfloat16)).t().float()


# name -> bits of a number, with its share of scale and offset; and the way
WAYS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "int4": (4.5, least_squares),
    "round to nearest": (4.5, nearest),
    "Q4_0": (4.5, q4_0),
    "groups of 64": (4.25, groups_of_64),
    "groups of 64, offset": (4.5, affine),
}
TORCHAO: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "torchao, groups of 32": (5, lambda weight: torchao(weight, 32, "tinygemm")),
    "torchao, groups of 64": (4.5, lambda weight: torchao(weight, 64, "tinygemm")),
    "torchao, hqq, groups of 64": (4.5, lambda weight: torchao(weight, 64, "hqq")),
}


def weights() -> dict[str, list[Tensor]]:
    """Normal random numbers; the same with outliers; and the matrices of the demo model, which are
    trained."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(ROWS, FEATURES, generator=generator)
    model, _ = load_hf_model("demo", device="cpu", dtype="float32")
    trained = [
        w for name, w in model.language_model.model.layers.named_parameters() if name.endswith("proj.weight")
    ]
    given = {"normal": [normal], "outliers": [with_outliers(normal, generator)], "demo model": trained}
    return {name: [w.bfloat16().float() for w in found] for name, found in given.items()}


def measured() -> dict[str, dict[str, float]]:
    """Each way: the bits of a number, and the error for each kind of weights."""
    ways, found = WAYS | (TORCHAO if find_spec("torchao") else {}), weights()
    return {
        way: {"bits": bits}
        | {kind: relative([(numbers(w), w) for w in given]) for kind, given in found.items()}
        for way, (bits, numbers) in ways.items()
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    kinds = list(rows["int4"])[1:]
    lines = [f"| | bits | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for way, row in rows.items():
        errors = " | ".join(f"{100 * row[kind]:.2f} %" for kind in kinds)
        lines.append(f"| {way} | {row['bits']:g} | {errors} |")
    if not find_spec("torchao"):
        lines.append(f"\ntorchao is not installed: {INSTALL}")
    return "\n".join(lines)


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The root mean square of all differences, relative to the weights."""
    squares = sum(float((numbers - weight).square().sum()) for numbers, weight in pairs)
    return (squares / sum(float(weight.square().sum()) for _, weight in pairs)) ** 0.5
