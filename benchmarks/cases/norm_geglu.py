"""norm_geglu: norm, the projections to gate and up, and GeGLU, of a decode."""

from functools import partial

from torch import Tensor

from paligemma.kernels.norm_geglu import norm_geglu

from .case import Case
from .geglu import plain_geglu
from .gemv import Products


def gate_up_case(shape: str, R: int, E: int, M: int, post: bool, quantize: str | None) -> Case:
    given = Products(R, E, 2 * M, post, quantize)

    def finish(y: Tensor, x: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
        return plain_geglu(*y.chunk(2, dim=-1)), x

    return Case(
        "norm_geglu", shape, given.variant, lambda device, dtype: tuple(given.make(device, dtype)),
        lambda *inputs: norm_geglu(*given.read(*inputs)[:3]), lambda *inputs: finish(*given.plain(*inputs)),
        lambda *inputs: finish(*given.exact(*inputs)), partial(given.bytes, outputs=M),
        chip=given.chip, weights=given.weights,
    )  # fmt: skip
