"""What is measured: each kernel at the shapes of the published models, and at odd ones.

A case makes its inputs, and computes them with the kernel, in plain torch, exactly (in float64), and with other people's
kernels. Letters are those of the model files; R is rows, tokens of all sequences together. `production` is in the order of
importance, so that a measurement that runs out of time has the first of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.decode_state import bucket
from paligemma.kernels.decode_attention import decode_attention
from paligemma.kernels.geglu import geglu
from paligemma.kernels.gemv import Rows
from paligemma.kernels.layer_norm import add_layer_norm, layer_norm
from paligemma.kernels.linear import Form, linear
from paligemma.kernels.next_token import next_token
from paligemma.kernels.norm_geglu import norm_geglu
from paligemma.kernels.norm_head import norm_head
from paligemma.kernels.norm_qkv_rope import norm_qkv_rope
from paligemma.kernels.prefill_attention import prefill_attention
from paligemma.kernels.project_add import project_add
from paligemma.kernels.rms_norm import add_rms_norm, rms_norm
from paligemma.kernels.rope import rope
from paligemma.kernels.top_p_histogram import STATE, top_p_histogram
from paligemma.kernels.top_p_search import top_p_search
from paligemma.layers import QUANTIZED

EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Case:
    kernel: str  # the launcher's name
    shape: str  # for people
    variant: str  # cases of one kernel and variant are computed by the same compiled kernel, for one dtype
    make: Callable[[torch.device | str, torch.dtype], tuple[Tensor, ...]]  # the inputs; "meta" is a device as well
    run: Callable[..., Any]  # inputs -> a tensor or several: the launcher
    plain: Callable[..., Any]  # the same in plain torch, as one would write it in that dtype
    exact: Callable[..., Any]  # the same in float64
    bytes: Callable[[int], int]  # itemsize -> the fewest bytes that must be moved
    flops: int = 0  # of matrix products
    peers: dict[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)  # name -> what makes the function
    hide: Callable[..., None] = lambda *inputs: None  # overwrite, in the inputs, what no result may depend on with NaN
    seen: Callable[..., tuple[Tensor, ...]] = lambda *results: results  # what of the results is the same whoever computed them
    chip: int = 80  # compute capability from which there is an instruction for its weights
    weights: Callable[..., tuple[Tensor | None, ...]] = lambda *inputs: ()  # the inputs that no kernel writes: weights and tables
    alone: Callable[..., Any] | None = None  # run, without what puts back the inputs that it changes

    @property
    def bare(self) -> Callable[..., Any]:
        return self.alone or self.run

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


class Decoder(NamedTuple):
    name: str
    E: int
    H: int
    K: int
    D: int
    M: int
    softcap: float | None = None
    window: int | None = None  # positions that every other layer sees
    scale: float | None = None  # of the scores; None: 1 / sqrt(D)


DECODERS = (
    Decoder("PaliGemma 3B", 2048, 8, 1, 256, 16384),
    Decoder("PaliGemma 2 3B", 2304, 8, 4, 256, 9216, 50.0, 4096),
    Decoder("PaliGemma 2 10B", 3584, 16, 8, 256, 14336, 50.0, 4096),
    Decoder("PaliGemma 2 28B", 4608, 32, 16, 128, 36864, 50.0, 4096, 144**-0.5),
)
LAYERS, VOCABULARY, FINAL_SOFTCAP = 18, 257_216, 30.0  # the first, of PaliGemma 3B
SIGLIP_WIDTH, SIGLIP_HEADS = 1152, (16, 16, 72)
TEXT = 16  # tokens of a prompt
IMAGE = {224: 256, 448: 1024, 896: 4096}  # pixels a side -> tokens
TILES = (Form(64, 64, 64, 4, 4), Form(64, 128, 64, 4, 4), Form(128, 128, 64, 4, 8))  # of a linear layer, beside cuBLAS's
CONTEXTS = (300, 1100, 4200)  # cached positions while decoding, at these resolutions


LINEARS: tuple[tuple[str, tuple[int, int, int], int, dict[str, bool]], ...] = (  # rows, features in, features out; splits
    ("SigLIP fc2", (256, 4304, SIGLIP_WIDTH), 4, {"bias": True}), ("SigLIP fc1", (256, SIGLIP_WIDTH, 4304), 1, {"bias": True, "gelu": True}),
    ("SigLIP out_proj", (4096, SIGLIP_WIDTH, SIGLIP_WIDTH), 1, {"bias": True}), ("down", (272, 16384, 2048), 4, {}),
)  # fmt: skip


def production() -> list[Case]:
    first, *later = DECODERS
    return [
        *token(None),
        *chain.from_iterable(products(first, rows, *of) for rows, *of in ((1, "int8"), (1, "fp8"), (4,), (16,), (16, "int8"), (16, "fp8"))),
        next_case(f"{first.name}, 16 rows", 16, first.E, first.D, VOCABULARY),
        *chain.from_iterable(sampling_cases(rows, VOCABULARY) for rows in (1, 16)),
        *decoder(first, rows=(1, 272, 4112, 4 * 4112), prefills=tuple(IMAGE), decodes=[(c, b) for c in CONTEXTS for b in (1, 4, 16) if (c, b) != (300, 1)]),
        *(prefill_case(f"SigLIP {size}, batch {b}", b, IMAGE[size], SIGLIP_HEADS) for size, b in ((224, 1), (448, 1), (896, 1), (224, 16))),
        *(norm_case(kernel, "SigLIP ", SIGLIP_WIDTH, rows) for kernel in ("layer_norm", "add_layer_norm") for rows in (256, 4096, 4 * 4096)),
        *chain.from_iterable(decoder(m, rows=(1, 4112), prefills=(224, 896), decodes=[(300, 1), (4200, 1), (4200, 16)]) for m in later),
        *chain.from_iterable(products(m, 1) for m in later),
        *(next_case(f"{m.name}, 1 rows", 1, m.E, m.D, VOCABULARY, m.window) for m in later),
        *chain.from_iterable(products(later[0], rows, *of) for rows, *of in ((1, "int8"), (1, "fp8"), (16,))),
        *(
            linear_case(f"{name}, {tile._replace(splits=splits)}", *sizes, tile._replace(splits=splits), **options)
            for name, sizes, splits, options in LINEARS
            for tile in TILES
        ),
    ]


def token(quantize: str | None) -> dict[Case, int]:
    """What makes a token of PaliGemma 3B at batch 1 and context 300, of which each layer has weights of its own, and how often it is launched."""
    m, context = DECODERS[0], CONTEXTS[0]
    attention = decode_case(f"{m.name}, {context} x 1", [context], None, (m.H, m.K, m.D))
    following = next_case(f"{m.name}, 1 rows", 1, m.E, m.D, VOCABULARY)
    return {case: 1 if case.kernel in ("norm_head", "next_token") else LAYERS for case in (*products(m, 1, quantize), attention, following)}


def decoder(m: Decoder, rows: tuple[int, ...], prefills: tuple[int, ...], decodes: list[tuple[int, int]]) -> list[Case]:
    """The cases of one decoder: numbers of rows, resolutions of a prefill (batch 1), and (context, batch) of a decode."""
    heads: tuple[int, int, int] = m.H, m.K, m.D
    options: dict[str, Any] = {"scale": m.scale, "softcap": m.softcap}
    cases = [decode_case(f"{m.name}, {c} x {b}", [c] * b, None, heads, **options) for c, b in decodes]
    cases += [prefill_case(f"{m.name}, {size}", 1, IMAGE[size] + TEXT, heads, **options) for size in prefills]
    cases += [norm_case(kernel, f"{m.name} ", m.E, r) for kernel in ("add_rms_norm", "rms_norm") for r in rows]
    cases += [rope_case(f"{m.name}, {r}", 4 if r > 4112 else 1, min(r, 4112), heads) for r in rows]
    cases += [geglu_case(f"{m.name}, {r}", r, m.M) for r in rows]
    if m.window:  # where it hides anything
        T = IMAGE[896] + TEXT
        starts = [[max(0, t + 1 - m.window) for t in range(T)]]
        cases.append(prefill_case(f"{m.name}, 896, window", 1, T, heads, starts=starts, **options))
        cases.append(decode_case(f"{m.name}, 4200 x 16, window", [4200] * 16, None, heads, starts=[4200 - m.window] * 16, **options))
    return cases


def products(m: Decoder, rows: int, quantize: str | None = None) -> list[Case]:
    """A token's weights, for some rows: what reads each of them once."""
    named, post = f"{m.name}, {rows} rows{f', {quantize}' if quantize else ''}", m.softcap is not None  # Gemma 2 has both
    return [
        qkv_case(named, rows, m.E, (m.H, m.K, m.D), post, quantize),
        project_case(f"{named}, attention", rows, m.H * m.D, m.E, not post, quantize),
        gate_up_case(named, rows, m.E, m.M, post, quantize),
        project_case(f"{named}, MLP", rows, m.M, m.E, not post, quantize),
        head_case(named, rows, m.E, VOCABULARY, post, quantize, FINAL_SOFTCAP if post else None, begins=True),
    ]


def odd() -> list[Case]:
    """Sizes that fit nothing by luck; the first of each kernel is for machines that interpret it."""
    norms = [(33, 17), (72, 130), (2047, 1), (2047, 65)]
    return [
        *(norm_case(kernel, "", E, rows) for kernel in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm") for E, rows in norms),
        *(geglu_case(f"{rows} x {M}", rows, M) for rows, M in ((17, 33), (1, 2047), (65, 4304), (3, 1))),
        *(
            rope_case(f"{B} x {T}, heads {heads}", B, T, heads, capacity=T + 13)
            for B, T, heads in ((2, 3, (4, 2, 24)), (2, 17, (4, 2, 24)), (3, 1, (3, 3, 20)), (1, 65, (8, 1, 256)), (2, 130, (3, 3, 72)), (5, 1, (8, 1, 256)))
        ),
        *(
            qkv_case(f"{rows} rows of {E}, heads {heads}", rows, E, heads, *kind)
            for rows, E, heads, kind in (
                (2, 384, (4, 2, 34), (True, None)),
                (1, 33, (3, 1, 20), (False, None)),
                (1, 2304, (4, 2, 72), (True, "int8")),
                (16, 2047, (2, 1, 256), (False, "fp8")),
            )
        ),
        *(
            project_case(f"{rows} rows, {size_in} to {size_out}", rows, size_in, size_out, *kind)
            for rows, size_in, size_out, kind in (
                (2, 384, 70, (True, None)),
                (1, 33, 7, (True, None)),
                (1, 4304, 1000, (False, "int8")),
                (16, 2047, 65, (True, "fp8")),
            )
        ),
        *(
            gate_up_case(f"{rows} rows, {E} to {M}", rows, E, M, *kind)
            for rows, E, M, kind in (
                (2, 384, 70, (True, None)),
                (1, 33, 7, (False, None)),
                (1, 2304, 1000, (True, "int8")),
                (16, 2047, 65, (False, "fp8")),
            )
        ),
        *(
            head_case(f"{rows} rows, {E} to {V}", rows, E, V, *kind)
            for rows, E, V, kind in (
                (2, 384, 70, (True, None, 3.0, True)),
                (1, 33, 7, (False, None, None, False)),
                (1, 2304, 1001, (True, "int8", 30.0, True)),
                (16, 2047, 65, (False, "fp8", None, True)),
            )
        ),
        *(
            next_case(f"{rows} rows of {E}{', given' * given}", rows, E, D, V, window, given)
            for rows, E, D, V, window, given in ((3, 33, 20, 70, 4, False), (1, 1100, 256, 7, None, False), (5, 2048, 72, 70, None, True))
        ),
        *chain.from_iterable(sampling_cases(*sizes) for sizes in ((2, 3001), (1, 7), (3, 2048))),
        *(
            linear_case(f"{rows} rows, {size_in} to {size_out}, {form}", rows, size_in, size_out, form, **options)
            for rows, size_in, size_out, form, options in (
                (17, 72, 40, Form(16, 32, 32, 2, 4, 2), {"bias": True, "gelu": True}),
                (130, 4304, 72, Form(64, 64, 64, 3, 4, 4), {"bias": True}),
                (65, 2047, 33, Form(64, 128, 64, 4, 4, 2), {}),
                (300, 33, 1000, Form(128, 128, 64, 4, 8), {"bias": True, "gelu": True}),
            )
        ),
        prefill_case("two short rows, D 24", 2, 5, (4, 2, 24), limits=[[2] * 5, [5] * 5]),
        prefill_case("ragged prefixes, D 24", 3, 17, (4, 2, 24), limits=[[n] * 17 for n in (1, 9, 17)]),
        prefill_case("ragged prefixes, D 72", 3, 130, (3, 3, 72), limits=[[n] * 130 for n in (3, 65, 130)]),
        prefill_case("causal suffix behind a history, D 20", 2, 65, (8, 1, 20), S=100, limits=[[max(p, 36 + t) for t in range(65)] for p in (36, 80)]),
        prefill_case("causal suffix, D 256", 2, 65, (8, 1, 256), limits=[[max(p, t + 1) for t in range(65)] for p in (7, 64)]),
        prefill_case("window and softcap, D 256", 2, 130, (8, 4, 256), starts=[[max(0, t - 20) for t in range(130)]] * 2, softcap=50.0, scale=144**-0.5),
        prefill_case("window, ragged, D 128", 2, 130, (4, 2, 128), limits=[[70] * 130, [130] * 130], starts=[[min(t, 69) for t in range(130)]] * 2),
        prefill_case("one query, D 72", 2, 1, (4, 2, 72), S=17, limits=[[1], [17]]),
        decode_case("a short and a full row, D 24", [1, 17], 17, (4, 2, 24)),
        decode_case("lengths at every edge, D 256", [1, 31, 32, 33, 640, 700], 700, (8, 1, 256)),
        decode_case("length 1 in a long cache, D 72", [1], 1500, (3, 3, 72)),
        decode_case("window and softcap, D 256", [5, 130, 700], 700, (8, 4, 256), starts=[0, 129, 333], softcap=50.0),
        decode_case("window, D 128, other scale", [65, 300], 300, (32, 16, 128), starts=[60, 0], scale=144**-0.5),
        decode_case("D 20", [2, 65, 17], 65, (8, 1, 20)),
    ]


# Norms


def norm_case(kernel: str, label: str, E: int, rows: int) -> Case:
    adds, has_bias = kernel.startswith("add_"), kernel.endswith("layer_norm")

    def make(device, dtype):
        inputs = [torch.randn(rows, E, device=device, dtype=dtype) for _ in range(1 + adds)]
        weight = 0.3 * torch.randn(E, device=device, dtype=dtype) + has_bias  # SigLIP's are centred on 1, Gemma's on 0
        return (*inputs, weight, *([torch.randn(E, device=device, dtype=dtype)] if has_bias else []))

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain)}
    plain = partial(plain_layer_norm if has_bias else plain_rms_norm, adds)
    if find_spec("liger_kernel") and kernel != "add_layer_norm":
        peers["Liger-Kernel"] = {"rms_norm": liger_rms_norm, "add_rms_norm": liger_add_rms_norm, "layer_norm": liger_layer_norm}[kernel]
    return Case(
        kernel, f"{label}{rows} x {E}", f"E {E}", make, partial(run_norm, kernel), plain, partial(exact_norm, adds, has_bias),
        lambda itemsize: itemsize * E * (rows * (4 if adds else 2) + 1 + has_bias), peers=peers, weights=lambda *inputs: inputs[1 + adds :],
    )  # fmt: skip


def run_norm(kernel: str, *inputs: Tensor):
    launchers: dict[str, Callable] = {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm, "layer_norm": layer_norm, "add_layer_norm": add_layer_norm}
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


# GeGLU


def geglu_case(shape: str, rows: int, M: int) -> Case:
    def make(device, dtype):
        return torch.randn(rows, M, device=device, dtype=dtype), torch.randn(rows, M, device=device, dtype=dtype)

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain_geglu)}
    if find_spec("liger_kernel"):
        peers["Liger-Kernel"] = liger_geglu
    return Case("geglu", shape, "", make, geglu, plain_geglu, exact_geglu, lambda itemsize: 3 * itemsize * rows * M, peers=peers)


def plain_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def exact_geglu(gate: Tensor, up: Tensor) -> Tensor:
    return plain_geglu(gate.double(), up.double())


def liger_geglu():
    from liger_kernel.ops.geglu import geglu_forward  # pyright: ignore[reportMissingImports]

    return lambda gate, up: geglu_forward(gate, up)[-1]


# RoPE and the cache write


def rope_case(shape: str, B: int, T: int, heads: tuple[int, int, int], capacity: int | None = None) -> Case:
    """Rows start at different positions of a cache with room for more."""
    (H, K, D), S = heads, capacity or T + 300

    def make(device, dtype):
        q, k, v = (torch.randn(B, T, n, D, device=device, dtype=dtype) for n in (H, K, K))
        positions = torch.tensor([[(S - T) * (b + 1) // B + t for t in range(T)] for b in range(B)], device=device)
        angle = positions[:, :, None].double() * 10000 ** (-torch.arange(D // 2, dtype=torch.float64, device=device) * 2 / D)
        rotation = torch.stack([angle.cos(), angle.sin()]).float()
        return q, k, v, rotation, positions, torch.randn(B, S, K, D, device=device, dtype=dtype), torch.randn(B, S, K, D, device=device, dtype=dtype)

    peers: dict[str, Callable[[], Callable]] = {"torch.compile": lambda: compiled(plain_rope)}
    if find_spec("liger_kernel"):
        peers["Liger-Kernel + index_put"] = liger_rope
    return Case(
        "rope", shape, f"H {H} K {K} D {D}{' T 1' * (T == 1)}", make, run_rope, plain_rope, exact_rope,
        lambda itemsize: B * T * (2 * itemsize * D * (H + 2 * K) + 4 * D + 8), peers=peers,
    )  # fmt: skip


def run_rope(q, k, v, rotation, positions, k_cache, v_cache):
    return rope(q, k, v, rotation, positions, k_cache, v_cache), k_cache, v_cache


def plain_rope(q, k, v, rotation, positions, k_cache, v_cache):
    row = torch.arange(len(q), device=q.device)[:, None]
    k_cache[row, positions] = turned(k.float(), rotation).to(k.dtype)
    v_cache[row, positions] = v
    return turned(q.float(), rotation).to(q.dtype), k_cache, v_cache


def exact_rope(q, k, v, rotation, positions, k_cache, v_cache):
    row = torch.arange(len(q), device=q.device)[:, None]
    keys, values = k_cache.double(), v_cache.double()
    keys[row, positions] = turned(k.double(), rotation.double())
    values[row, positions] = v.double()
    return turned(q.double(), rotation.double()), keys, values


def turned(x: Tensor, rotation: Tensor) -> Tensor:  # (B, T, H, D), (2, B, T, D/2) of one dtype
    cos, sin = rotation[:, :, :, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def liger_rope():
    """It turns q and k in place, and writes no cache: torch does, after it."""
    from liger_kernel.ops.rope import rope_forward  # pyright: ignore[reportMissingImports]

    def run(q, k, v, rotation, positions, k_cache, v_cache):
        row = torch.arange(len(q), device=q.device)[:, None]
        q, k, *_ = rope_forward(q.transpose(1, 2), k.transpose(1, 2), rotation[0], rotation[1], rotary_dim=q.shape[-1])
        k_cache[row, positions] = k.transpose(1, 2)
        v_cache[row, positions] = v
        return q.transpose(1, 2), k_cache, v_cache

    return run


# The linear layers of a first token


def linear_case(shape: str, rows: int, size_in: int, size_out: int, form: Form, bias: bool = False, gelu: bool = False) -> Case:
    """In float32 with a small tile in place of the form's, because its products are made from registers."""

    def make(device, dtype):
        x, weight = torch.randn(rows, size_in, device=device, dtype=dtype), size_in**-0.5 * torch.randn(size_out, size_in, device=device, dtype=dtype)
        biases = [torch.randn(size_out, device=device, dtype=dtype)] if bias else []
        return x, weight, *biases

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias, Form(32, 32, 32, 1, 4, form.splits) if x.dtype == torch.float32 else form, gelu)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate="tanh") if gelu else y

    variant = f"{form._replace(splits=1)}{' bias' * bias}{' gelu' * gelu}{' split' * (form.splits > 1)}{' odd' * bool(size_in % 16 or size_out % 16)}"
    return Case(
        "linear", shape, variant, make, run, plain, lambda *inputs: plain(*(x.double() for x in inputs)),
        lambda itemsize: itemsize * (rows * size_in + size_out * size_in + rows * size_out + size_out * bias), 2 * rows * size_in * size_out,
        weights=lambda *inputs: inputs[1:],
    )  # fmt: skip


# The products of a decode, with what comes before and after them


class Products(NamedTuple):
    """How the inputs of a case are to be read: x; of a branch, itself, its norm's weight and its squares; the norm, the weight, its scale; the rest."""

    R: int
    E: int  # features in
    N: int  # outputs
    post: bool  # whether x is the sum with a normalised branch
    quantize: str | None
    normed: bool = True

    @property
    def variant(self) -> str:
        return f"{self.E} to {self.N} rows {1 if self.R == 1 else 16}{' sum' * self.post}{f' {self.quantize}' if self.quantize else ''}"

    @property
    def chip(self) -> int:
        return 89 if self.quantize == "fp8" else 80

    def make(self, device, dtype) -> list[Tensor]:
        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(*shape, device=device, dtype=dtype)

        inputs = [normal(self.R, self.E)]
        if self.post:  # and what project_add leaves of the branch: a sum of squares for each block of 4 outputs
            branch = normal(self.R, self.E)
            parts = [part.sum(dim=1) for part in branch.float().square().tensor_split(-(-self.E // 4), dim=1)]
            inputs += [branch, normal(self.E, scale=0.3), torch.stack(parts, dim=1)]
        inputs += [normal(self.E, scale=0.3)] if self.normed else []
        if self.quantize is None:
            return [*inputs, normal(self.N, self.E, scale=self.E**-0.5)]
        largest = {"int8": 127, "fp8": 448}[self.quantize]
        scale = torch.rand(self.N, device=device, dtype=dtype) * 2 / largest / self.E**0.5 + torch.finfo(dtype).tiny
        return [*inputs, normal(self.N, self.E, scale=largest / 3).clamp_(-largest, largest).to(QUANTIZED[self.quantize]), scale]

    def read(self, *inputs: Tensor) -> tuple[Rows, Tensor, Tensor | None, list[Tensor]]:
        rest = list(inputs)
        x = rest.pop(0)
        branch, post, squares = (rest.pop(0) if self.post else None for _ in range(3))
        rows = Rows(x, branch, post, rest.pop(0) if self.normed else None, EPS, squares)
        return rows, rest.pop(0), rest.pop(0) if self.quantize else None, rest

    def weights(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale, _ = self.read(*inputs)
        return rows.post, rows.norm, weight, scale

    def plain(self, *inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The outputs (R, N), x or the sum (R, E), and the rest of the inputs."""
        rows, weight, scale, rest = self.read(*inputs)
        x = rows.x if rows.branch is None or rows.post is None else rows.x + plain_norm(rows.branch, rows.post)
        z = x if rows.norm is None else plain_norm(x, rows.norm)
        return F.linear(z, weight) if scale is None else F.linear(z, weight.to(x.dtype)) * scale, x, rest

    def exact(self, *inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        rows, weight, scale, rest = self.read(*inputs)
        x = rows.x.double()
        if rows.branch is not None and rows.post is not None:
            x = (x + exact_rms_norm(rows.branch, rows.post)).to(rows.x.dtype).double()  # as it is handed on
        z = x if rows.norm is None else exact_rms_norm(x, rows.norm)
        blocks = [z @ part.double().T for part in weight.split(1 << 14)]  # the head whole would take 4 to 9 GB
        return torch.cat(blocks, dim=-1) * (1 if scale is None else scale.double()), x, rest

    def bytes(self, itemsize: int, outputs: int) -> int:
        scales = self.N * itemsize if self.quantize else 0
        return self.N * self.E * (1 if self.quantize else itemsize) + scales + itemsize * (self.R * self.E * (1 + 2 * self.post) + self.R * outputs)


def qkv_case(shape: str, R: int, E: int, heads: tuple[int, int, int], post: bool, quantize: str | None) -> Case:
    """Rows are sequences that decode, at different positions of a cache."""
    (H, K, D), S = heads, 320
    given = Products(R, E, (H + 2 * K) * D, post, quantize)

    def make(device, dtype):
        positions = torch.tensor([[(S - 1) * (r + 1) // R] for r in range(R)], device=device)
        angle = positions[:, :, None].double() * 10000 ** (-torch.arange(D // 2, dtype=torch.float64, device=device) * 2 / D)
        caches = (torch.randn(R, S, K, D, device=device, dtype=dtype) for _ in range(2))
        return *given.make(device, dtype), torch.stack([angle.cos(), angle.sin()]).float(), positions, *caches

    def run(*inputs: Tensor):
        rows, weight, scale, (rotation, positions, k_cache, v_cache) = given.read(*inputs)
        return *norm_qkv_rope(rows, weight, scale, rotation, positions, k_cache, v_cache), k_cache, v_cache

    def finish(turn: Callable, y: Tensor, x: Tensor, rest: list[Tensor]):
        q, k, v = (part.unflatten(-1, (1, -1, D)) for part in y.split([H * D, K * D, K * D], dim=-1))
        q, k_cache, v_cache = turn(q, k, v, *rest)
        return q, x, k_cache, v_cache

    return Case(
        "norm_qkv_rope", shape, f"{given.variant} heads {heads}", make, run, lambda *inputs: finish(plain_rope, *given.plain(*inputs)),
        lambda *inputs: finish(exact_rope, *given.exact(*inputs)), partial(given.bytes, outputs=given.N), chip=given.chip, weights=given.weights,
    )  # fmt: skip


def project_case(shape: str, R: int, size_in: int, size_out: int, adds: bool, quantize: str | None) -> Case:
    given = Products(R, size_in, size_out, False, quantize, normed=False)

    def run(*inputs: Tensor):
        rows, weight, scale, rest = given.read(*inputs)
        out, squares = project_add(rows.x, weight, scale, rest[0] if adds else None)
        return out if squares is None else (out, squares)

    def finish(y: Tensor, x: Tensor, rest: list[Tensor]):
        return y + rest[0] if adds else (y, y.to(torch.promote_types(y.dtype, torch.float32)).square())

    def seen(y: Tensor, *squares: Tensor):
        """The outputs, and 1 for each row whose sum of squares is not that of its outputs."""
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return y, *((parts.sum(dim=1) / y.square().sum(dim=1) - 1).abs().gt(1e-5).long() for parts in squares)

    return Case(
        "project_add", shape, f"{given.variant}{' adds' * adds}",
        lambda device, dtype: (*given.make(device, dtype), *([torch.randn(R, size_out, device=device, dtype=dtype)] if adds else [])),
        run, lambda *inputs: finish(*given.plain(*inputs)), lambda *inputs: finish(*given.exact(*inputs)),
        partial(given.bytes, outputs=(1 + adds) * size_out), chip=given.chip, seen=seen, weights=given.weights,
    )  # fmt: skip


def gate_up_case(shape: str, R: int, E: int, M: int, post: bool, quantize: str | None) -> Case:
    given = Products(R, E, 2 * M, post, quantize)

    def finish(y: Tensor, x: Tensor, rest: list[Tensor]) -> tuple[Tensor, Tensor]:
        return plain_geglu(*y.chunk(2, dim=-1)), x

    return Case(
        "norm_geglu", shape, given.variant, lambda device, dtype: tuple(given.make(device, dtype)), lambda *inputs: norm_geglu(*given.read(*inputs)[:3]),
        lambda *inputs: finish(*given.plain(*inputs)), lambda *inputs: finish(*given.exact(*inputs)), partial(given.bytes, outputs=M),
        chip=given.chip, weights=given.weights,
    )  # fmt: skip


def head_case(shape: str, R: int, E: int, V: int, post: bool, quantize: str | None, softcap: float | None, begins: bool = False) -> Case:
    """begins: with the beginning of the argmax; others make a whole one."""
    given = Products(R, E, V, post, quantize)

    def make(device, dtype):
        return *given.make(device, dtype), *([torch.full((R, PLACES), LOWEST, device=device)] if begins else [])

    def run(*inputs: Tensor):
        rows, weight, scale, best = given.read(*inputs)
        logits = norm_head(rows, weight, scale, softcap, *best)
        return logits, *best

    def finish(y: Tensor):
        logits = capped(y, softcap)
        return (logits, logits.argmax(dim=-1)) if begins else (logits,)

    def seen(logits: Tensor, *best: Tensor):
        """The logits, and 1 for each row of which the token is not that of its largest one."""
        tokens = ((chosen(x) if x.ndim == 2 else x).clamp(0, V - 1) for x in best)
        return logits, *((logits.gather(1, x[:, None])[:, 0] < logits.amax(dim=-1)).long() for x in tokens)

    return Case(
        "norm_head", shape, f"{given.variant}{' softcap' * bool(softcap)}{' argmax' * begins}", make, run,
        lambda *inputs: finish(given.plain(*inputs)[0].float()), lambda *inputs: finish(given.exact(*inputs)[0]),
        lambda itemsize: given.bytes(itemsize, 0) + 4 * R * V, chip=given.chip, seen=seen, weights=given.weights,
    )  # fmt: skip


# Between two tokens


PLACES, LOWEST, LAST, INFINITE = 64, -(1 << 63), (1 << 32) - 1, 0x7F800000  # of a row's argmax; see norm_head.py


def numbered(logits: Tensor, index: Tensor) -> Tensor:
    """float32 and int64 -> int64 in the order of the logits, of equals the lower index first; NaN and infinity above all others."""
    bits = logits.view(torch.int32).long()
    bits = torch.where(logits.isfinite(), torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits), INFINITE)
    return (bits << 32) | (LAST - index)


def chosen(best: Tensor) -> Tensor:  # (B, places) -> (B,)
    largest = best.amax(dim=1)
    return torch.where(largest >> 32 >= INFINITE, -1, LAST - (largest & LAST))


def next_case(shape: str, B: int, E: int, D: int, V: int, window: int | None = None, given: bool = False) -> Case:
    """The kernel with a copy before it, which puts back what it changes. given: the tokens are; else their argmax is begun, and of several
    rows the last one's logits have a NaN."""
    N, S = 9, 320
    sizes = (B * PLACES, N * B, B, B, B, B)

    def make(device, dtype):
        index = torch.randint(V, (B, PLACES), device=device)
        logits = torch.randn(B, PLACES, device=device)
        logits[1:][-1:, 5] = math.nan
        row = torch.arange(B, device=device)
        state = [numbered(logits, index).flatten(), torch.full((N * B,), -7, device=device), row % N, (S - 2) * (row + 1) // B, row, row]
        angle = torch.randn(S, D // 2, device=device)
        saved = torch.cat(state)
        return saved, saved.clone(), torch.randn(V, E, device=device, dtype=dtype), torch.stack([angle.cos(), angle.sin()]), index[:, 0].contiguous()

    def parts(state: Tensor) -> tuple[Tensor, ...]:
        best, said, count, position, limit, start = state.split(sizes)
        return best.view(B, PLACES), said.view(N, B), count, position.view(B, 1), limit.view(B, 1), start.view(B, 1)

    def run(saved: Tensor, state: Tensor, *others: Tensor):
        return alone(saved, state.copy_(saved), *others)

    def alone(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        best, said, count, position, limit, start = parts(state)
        x, rotation = table.new_empty(B, 1, E), rope.new_empty(2, B, 1, D // 2)
        start = start if window else None
        next_token(tokens if given else None, best, said, count, position, limit, start, window or 0, x, rotation, table, rope)
        return x, rotation, state

    def formula(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        best, said, count, position, limit, start = parts(state.copy_(saved))
        token = tokens if given else chosen(best)
        if not given:
            best.fill_(LOWEST)
        said[count, torch.arange(B, device=said.device)] = token
        count += 1
        position += 1
        limit.copy_(position + 1)
        if window:
            start.copy_((limit - window).clamp_(min=0))
        x = table[token.clamp(min=0)[:, None]]
        x = x * math.sqrt(E) if x.dtype == torch.float64 else (x.float() * math.sqrt(E)).to(x.dtype)
        return x, rope[:, position], state

    def exact(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        return formula(saved, state, table.double(), rope.double(), tokens)

    return Case(
        "next_token", shape, f"E {E} D {D}{' window' * bool(window)}{' given' * given}", make, run, formula, exact,
        lambda itemsize: B * (2 * E * itemsize + 16 * PLACES + 8 * D + 40), weights=lambda *inputs: inputs[2:4], alone=alone,
    )  # fmt: skip


# Sampling by top-p


def sampling_cases(B: int, V: int) -> list[Case]:
    """The three launches of a token, each with a copy before it, which puts back what it changes. Of several rows the last one's logits have a NaN,
    and half of the logits are ties. Tokens are those of a sort."""
    sizes = B * STATE.value, B * PLACES, B, B * V, B

    def parts(state: Tensor) -> tuple[Tensor, ...]:
        masses, best, count, room, tokens = state.split(sizes)
        return masses.view(B, -1), best.view(B, PLACES), count, room.view(B, V), tokens

    def make(launches: int, device, dtype):
        """As after so many launches of a token."""
        logits = 3 * torch.randn(B, V, device=device)
        logits[:, ::2] = logits[:, ::2].round()
        logits[1:][-1:, 5] = math.nan
        best = torch.full((B, PLACES), LOWEST, device=device)
        best[:, 3] = numbered(logits, torch.arange(V, device=device)).amax(dim=1)
        masses, count = torch.zeros(B, STATE.value, device=device, dtype=torch.int64), torch.arange(B, device=device)
        room, tokens = torch.full((B, V), -7, device=device), torch.full((B,), -7, device=device)
        saved = torch.cat([x.flatten() for x in (masses, best, count, room, tokens)])
        temperature, top_p = (torch.full((), x, device=device, dtype=torch.float64) for x in (0.8, 0.9))
        given = logits, temperature, top_p, torch.rand(B, B, device=device, dtype=torch.float64)
        for launch in range(launches):
            expected(launch, saved, *given)
        return saved, saved.clone(), *given

    def alone(launch: int, saved: Tensor, state: Tensor, logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor):
        masses, best, count, room, tokens = parts(state)
        if launch == 0:
            top_p_histogram(logits, best, temperature, masses)
        else:
            top_p_search(logits, best, temperature, top_p, uniform, count, masses, room, tokens if launch == 2 else None)
        return masses, best, tokens

    def expected(launch: int, state: Tensor, logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> None:
        """What the launch makes of the state, but for what is in the room."""
        masses, best, count, _, tokens = parts(state)
        finite = logits.isfinite().all(dim=1)
        peak = best.amax(dim=1) >> 32
        peak = torch.where(finite, peak ^ ((peak >> 63) & 0x7FFFFFFF), 0).int().view(torch.float32)[:, None]
        weights = (((logits.double() - peak) / temperature).exp() * 2.0**43).round().nan_to_num().long() * finite[:, None]
        order = logits.sort(dim=1, descending=True, stable=True).indices
        reached = weights.gather(1, order).cumsum(dim=1)
        nucleus = (top_p * reached[:, -1:]).ceil().long()
        nucleus = reached.gather(1, torch.searchsorted(reached, nucleus).clamp(max=V - 1))
        bins = ((peak - logits) * 64).nan_to_num().clamp(0, 4095).long()
        if launch == 0:
            masses[:, :4096].scatter_add_(1, bins, weights)
        elif launch == 1:
            last = torch.searchsorted(reached, nucleus).clamp(max=V - 1)
            inside = (bins == bins.gather(1, order.gather(1, last))) & finite[:, None]
            masses[:, 4096], masses[:, 4098], masses[:, 4100] = inside.sum(dim=1), -(-V // 2048), nucleus[:, 0]
        else:
            u = uniform.gather(1, count[:, None])
            index = torch.searchsorted(reached, (u * nucleus).long(), right=True).clamp(max=V - 1)
            tokens.copy_(torch.where(finite, order.gather(1, index)[:, 0], -1))
            masses.zero_()
            best.fill_(LOWEST)

    def formula(launch: int, saved: Tensor, state: Tensor, *given: Tensor):
        expected(launch, state.copy_(saved), *given)
        return state

    def run(launch: int, saved: Tensor, state: Tensor, *given: Tensor):
        alone(launch, saved, state.copy_(saved), *given)
        return state

    def seen(state: Tensor):
        """All but the list, whose order is anyone's; weights in 2^-20, which no last bit of an exponential changes."""
        masses, best, count, _, tokens = parts(state)
        weights, counts = torch.cat([masses[:, :4096], masses[:, 4100:]], dim=1), masses[:, 4096:4100]
        return (weights + (1 << 22)) >> 23, counts, best, count, tokens

    names = ("top_p_histogram", ""), ("top_p_search", " first"), ("top_p_search", " second")
    return [
        Case(
            kernel, f"{B} x {V}{which}", f"V {V}{which}", partial(make, launch),
            partial(run, launch), partial(formula, launch), partial(formula, launch), lambda itemsize: B * (4 * V + 8 * 4096), seen=seen,
            alone=partial(alone, launch),
        )
        for launch, (kernel, which) in enumerate(names)
    ]  # fmt: skip


# Attention


def prefill_case(shape: str, B: int, T: int, heads: tuple[int, int, int], S: int | None = None, limits=None, starts=None, scale=None, softcap=None) -> Case:
    S = S or T
    return attention_case("prefill_attention", shape, T, S, heads, limits or [[S] * T] * B, starts, scale, softcap)


def decode_case(
    shape: str, lengths: list[int], S: int | None, heads: tuple[int, int, int], starts: list[int] | None = None, scale=None, softcap=None
) -> Case:  # fmt: skip
    """No S: as many positions as a cache has that these lengths fit in, by which the kernel makes its splits."""
    S = bucket(max(lengths)) if S is None else S
    starts_of_rows = None if starts is None else [[start] for start in starts]
    return attention_case("decode_attention", shape, 1, S, heads, [[length] for length in lengths], starts_of_rows, scale, softcap)


def attention_case(
    kernel: str, shape: str, T: int, S: int, heads: tuple[int, int, int],
    limits: list[list[int]], starts: list[list[int]] | None, scale: float | None, softcap: float | None,
) -> Case:  # fmt: skip
    """limits and starts (B, T): query (b, t) sees positions starts[b][t] <= s < limits[b][t]."""
    B, (H, K, D) = len(limits), heads
    scale = 1 / math.sqrt(D) if scale is None else scale
    first = starts or [[0] * T] * B
    seen = [(min(a), max(b)) for a, b in zip(first, limits, strict=True)]  # of each row, by any query
    pairs = sum(b - a for starts_, limits_ in zip(first, limits, strict=True) for a, b in zip(starts_, limits_, strict=True))
    longest = max(b for _, b in seen)  # behind it nobody looks, and only our kernel is given what is there
    masked, whole = pairs < B * T * longest, all(limit == longest for row in limits for limit in row)
    decode = kernel == "decode_attention"

    def make(device, dtype):
        q = torch.randn(B, T, H, D, device=device, dtype=dtype)
        k, v = torch.randn(2, B, S, K, D, device=device, dtype=dtype).unbind(0)
        if heads == SIGLIP_HEADS:  # one product makes all three
            q, k, v = torch.randn(B, T, 3 * H, D, device=device, dtype=dtype).split(H, dim=2)
        places = [torch.tensor(x, device=device) for x in (limits, starts) if x is not None]
        return q, k, v, *places, *([torch.zeros(B * K, dtype=torch.int32, device=device)] if decode else [])

    def others(attend: Callable) -> Callable:
        """Of what the others are given: no tickets, and no position that nobody sees."""

        def run(q, k, v, *rest):
            return attend(q, k[:, :longest], v[:, :longest], *(rest[:-1] if decode else rest))

        return run

    def hide(q, k, v, *rest):
        for b, (start, limit) in enumerate(seen):
            for x in (k, v):
                x[b, :start] = x[b, limit:] = float("nan")

    options = {"scale": scale, "softcap": softcap}
    peers: dict[str, Callable[[], Callable]] = {}
    if whole and softcap is not None:
        peers["flex_attention"] = lambda: others(flex(**options))
    elif not masked:
        peers |= {f"SDPA {name}": partial(lambda name, scale: others(sdpa(name, scale)), name, scale) for name in ("flash", "cudnn", "efficient")}
    return Case(
        kernel, shape, f"H {H} K {K} D {D}{' softcap' * bool(softcap)}{' start' * bool(starts)}{' T 1' * (T == 1 and kernel == 'prefill_attention')}", make,
        partial(run_decode_attention if decode else run_prefill_attention, options),
        others(partial(plain_attention, masked, **options)), others(partial(exact_attention, **options)),
        lambda itemsize: itemsize * D * (2 * B * T * H + 2 * K * sum(b - a for a, b in seen)), 4 * H * D * pairs, peers, hide,
    )  # fmt: skip


def run_prefill_attention(options: dict, q: Tensor, k: Tensor, v: Tensor, limit: Tensor, start: Tensor | None = None) -> Tensor:
    return prefill_attention(q, k, v, limit, start=start, **options)


def run_decode_attention(options: dict, q: Tensor, k: Tensor, v: Tensor, limit: Tensor, *rest: Tensor) -> Tensor:
    *start, tickets = rest
    return decode_attention(q, k, v, limit, start=start[0] if start else None, tickets=tickets, **options)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def visible(limit: Tensor, start: Tensor | None, S: int) -> Tensor:  # -> (B, T, S)
    position = torch.arange(S, device=limit.device)
    seen = position < limit[:, :, None]
    return seen if start is None else seen & (position >= start[:, :, None])


def plain_attention(masked: bool, q, k, v, limit, start=None, *, scale: float, softcap: float | None) -> Tensor:
    """As transformers' eager attention: keys and values copied for every head, softmax in float32."""
    G = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)))
    scores = capped(q @ k.transpose(2, 3) * scale, softcap)
    if masked:
        scores = scores.masked_fill(~visible(limit, start, k.shape[2])[:, None], torch.finfo(scores.dtype).min)
    p = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (p @ v).transpose(1, 2).flatten(2)


def exact_attention(q, k, v, limit, start=None, *, scale: float, softcap: float | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    G, seen = q.shape[2] // k.shape[2], visible(limit, start, k.shape[1])
    out = torch.empty_like(q)
    for h in range(q.shape[2]):  # a head at a time: the scores of 4112 tokens take 135 MB
        scores = capped(q[:, :, h] @ k[:, :, h // G].transpose(1, 2) * scale, softcap)
        out[:, :, h] = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v[:, :, h // G]
    return out.flatten(2)


def sdpa(name: str, scale: float):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}

    def run(q, k, v, limit):
        G = q.shape[2] // k.shape[2]
        if name == "efficient" and G > 1:  # it takes no groups
            k, v, G = k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2), 1
        with sdpa_kernel(backend[name]):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale, enable_gqa=G > 1)
        return out.transpose(1, 2).flatten(2)

    return run


def flex(scale: float, softcap: float, compile: bool = True):
    """All positions are seen, from `start` on."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q, k, v, limit, start=None):
        def score_mod(score, b, h, q_index, kv_index):
            score = capped(score, softcap)
            return score if start is None else torch.where(kv_index >= start[b, q_index], score, -torch.inf)

        grouped = q.shape[2] != k.shape[2]
        out: Any = flex_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), score_mod=score_mod, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    return compiled(run) if compile else run


def compiled(function: Callable) -> Callable:
    """For one shape; a graph break or a second one would be an error, not a slower program."""
    torch.compiler.reset()  # of what earlier cases compiled from the same function
    return torch.compile(function, fullgraph=True, dynamic=False)
