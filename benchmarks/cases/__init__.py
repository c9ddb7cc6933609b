"""The cases: each kernel at the shapes of the published models, and at odd shapes.

A case (`case.py`) is one kernel at one shape. It creates inputs, and it computes the result with the kernel,
in plain torch, in float64, and with other implementations. The tests, the benchmarks, the search for races
and the table of resources use the same cases.

- `case.py`: what a case is.
- `models.py`: the shapes of the published models.
- The other files: each defines the cases of one kernel, or of a few kernels that share functions. A file that
  defines one kernel's cases has the name of the kernel's file in `kernels/`. `gemv.py` holds what the kernels
  for the products of a decode share.
- This file: the lists of cases.

R is the number of rows: the tokens of all sequences together. `models.py` explains the other letters.
"""

from itertools import chain
from typing import Any

from paligemma.kernels.linear import Form

from .attention import decode_case, prefill_case
from .case import Case
from .geglu import geglu_case
from .linear import TILES, linear_case
from .models import (
    CONTEXTS,
    DECODERS,
    FINAL_SOFTCAP,
    IMAGE,
    LAYERS,
    SIGLIP_HEADS,
    SIGLIP_WIDTH,
    TEXT,
    VOCABULARY,
    Decoder,
)
from .next_token import next_case
from .norm_geglu import gate_up_case
from .norm_head import head_case
from .norm_qkv_rope import qkv_case
from .norms import norm_case
from .project_add import project_case
from .rope import rope_case
from .sampling import sampling_cases

LINEARS: tuple[tuple[str, tuple[int, int, int], int, dict[str, bool]], ...] = (
    # name, (rows, input features, output features), splits, options of linear_case
    ("SigLIP fc2", (256, 4304, SIGLIP_WIDTH), 4, {"bias": True}),
    ("SigLIP fc1", (256, SIGLIP_WIDTH, 4304), 1, {"bias": True, "gelu": True}),
    ("SigLIP out_proj", (4096, SIGLIP_WIDTH, SIGLIP_WIDTH), 1, {"bias": True}),
    ("down", (272, 16384, 2048), 4, {}),
)


def production() -> list[Case]:
    """The cases at the shapes of the published models, the most important first: a measurement may run out of
    time before the last one."""
    first, *later = DECODERS
    kinds = ((1, "int8"), (1, "fp8"), (4, None), (16, None), (16, "int8"), (16, "fp8"))  # rows, quantize
    batches = [(context, b) for context in CONTEXTS for b in (1, 4, 16) if (context, b) != (300, 1)]
    forms = [(*linear, tile._replace(splits=linear[2])) for linear in LINEARS for tile in TILES]
    return [
        *token(None),
        *chain.from_iterable(products(first, *kind) for kind in kinds),
        next_case(f"{first.name}, 16 rows", 16, first.E, first.D, VOCABULARY),
        *chain.from_iterable(sampling_cases(rows, VOCABULARY) for rows in (1, 16)),
        *decoder(first, rows=(1, 272, 4112, 4 * 4112), prefills=tuple(IMAGE), decodes=batches),
        *(
            prefill_case(f"SigLIP {size}, batch {b}", b, IMAGE[size], SIGLIP_HEADS)
            for size, b in ((224, 1), (448, 1), (896, 1), (224, 16))
        ),
        *(
            norm_case(kernel, "SigLIP ", SIGLIP_WIDTH, rows)
            for kernel in ("layer_norm", "add_layer_norm")
            for rows in (256, 4096, 4 * 4096)
        ),
        *chain.from_iterable(
            decoder(m, rows=(1, 4112), prefills=(224, 896), decodes=[(300, 1), (4200, 1), (4200, 16)])
            for m in later
        ),
        *chain.from_iterable(products(m, 1) for m in later),
        *(next_case(f"{m.name}, 1 rows", 1, m.E, m.D, VOCABULARY, m.window) for m in later),
        *chain.from_iterable(products(m, 1, quantize) for m in later for quantize in ("int8", "fp8")),
        *chain.from_iterable(products(m, 1, "int4") for m in DECODERS),
        *products(later[0], 16),
        *products(later[1], 4, "int8"),
        *(linear_case(f"{name}, {form}", *sizes, form, **options) for name, sizes, _, options, form in forms),
    ]


def token(quantize: str | None) -> dict[Case, int]:
    """The cases of one decoded token (PaliGemma 3B, batch 1, context 300): case -> its number of launches."""
    m, context = DECODERS[0], CONTEXTS[0]
    attention = decode_case(f"{m.name}, {context} x 1", [context], None, (m.H, m.K, m.D))
    following = next_case(f"{m.name}, 1 rows", 1, m.E, m.D, VOCABULARY)
    head = products(m, 1, "int8")[-1:] if quantize == "int4" else []
    return {
        case: 1 if case.kernel in ("norm_head", "next_token") else LAYERS
        for case in (*products(m, 1, quantize), *head, attention, following)
    }


def decoder(
    m: Decoder, rows: tuple[int, ...], prefills: tuple[int, ...], decodes: list[tuple[int, int]]
) -> list[Case]:
    """The cases of one decoder, except its products: for numbers of rows, for resolutions of a prefill (batch
    1), and for (context, batch) of a decode."""
    heads: tuple[int, int, int] = m.H, m.K, m.D
    options: dict[str, Any] = {"scale": m.scale, "softcap": m.softcap}
    cases = [decode_case(f"{m.name}, {c} x {b}", [c] * b, None, heads, **options) for c, b in decodes]
    cases += [prefill_case(f"{m.name}, {size}", 1, IMAGE[size] + TEXT, heads, **options) for size in prefills]
    cases += [
        norm_case(kernel, f"{m.name} ", m.E, r) for kernel in ("add_rms_norm", "rms_norm") for r in rows
    ]
    cases += [rope_case(f"{m.name}, {r}", 4 if r > 4112 else 1, min(r, 4112), heads) for r in rows]
    cases += [geglu_case(f"{m.name}, {r}", r, m.M) for r in rows]
    if m.window:  # these contexts are longer than the window
        T = IMAGE[896] + TEXT
        starts = [[max(0, t + 1 - m.window) for t in range(T)]]
        cases.append(prefill_case(f"{m.name}, 896, window", 1, T, heads, starts=starts, **options))
        name, since = f"{m.name}, 4200 x 16, window", [4200 - m.window] * 16
        cases.append(decode_case(name, [4200] * 16, None, heads, starts=since, **options))
    return cases


def products(m: Decoder, rows: int, quantize: str | None = None) -> list[Case]:
    """The products of one decoder for a few rows: together they read each kind of weight of a layer, and the
    head, once."""
    named = f"{m.name}, {rows} rows{f', {quantize}' if quantize else ''}"
    post = m.softcap is not None  # Gemma 2 has softcaps and norms after the branches
    layer = [
        qkv_case(named, rows, m.E, (m.H, m.K, m.D), post, quantize),
        project_case(f"{named}, attention", rows, m.H * m.D, m.E, not post, quantize),
        gate_up_case(named, rows, m.E, m.M, post, quantize),
        project_case(f"{named}, MLP", rows, m.M, m.E, not post, quantize),
    ]
    if quantize == "int4":  # the head of such a model is 8-bit
        return layer
    return [
        *layer,
        head_case(named, rows, m.E, VOCABULARY, post, quantize, FINAL_SOFTCAP if post else None, begins=True),
    ]


def odd() -> list[Case]:
    """The cases at odd sizes, most of which no block size divides. The first case of each kernel is small
    enough for the interpreter."""
    norms = [(33, 17), (72, 130), (2047, 1), (2047, 65)]
    ropes = [
        (2, 3, (4, 2, 24)), (2, 17, (4, 2, 24)), (3, 1, (3, 3, 20)),
        (1, 65, (8, 1, 256)), (2, 130, (3, 3, 72)), (5, 1, (8, 1, 256)),
    ]  # fmt: skip
    qkvs = [
        (2, 384, (4, 2, 34), (True, None)), (1, 33, (3, 1, 20), (False, None)),
        (1, 2304, (4, 2, 72), (True, "int8")), (16, 2047, (2, 1, 256), (False, "fp8")),
        (3, 1120, (4, 2, 34), (True, "int4")),
    ]  # fmt: skip
    projections = [
        (2, 384, 70, (True, None)), (1, 33, 7, (True, None)),
        (1, 4304, 1000, (False, "int8")), (16, 2047, 65, (True, "fp8")), (1, 5664, 65, (True, "int4")),
    ]  # fmt: skip
    mlps = [
        (2, 384, 70, (True, None)), (1, 33, 7, (False, None)),
        (1, 2304, 1000, (True, "int8")), (16, 2047, 65, (False, "fp8")), (1, 1120, 8200, (True, "int4")),
    ]  # fmt: skip
    heads = [
        (2, 384, 70, (True, None, 3.0, True)), (1, 33, 7, (False, None, None, False)),
        (1, 2304, 1001, (True, "int8", 30.0, True)), (16, 2047, 65, (False, "fp8", None, True)),
    ]  # fmt: skip
    tokens = [(3, 33, 20, 70, 4, False), (1, 1100, 256, 7, None, False), (5, 2048, 72, 70, None, True)]
    linears = [
        (17, 72, 40, Form(16, 32, 32, 2, 4, 2), {"bias": True, "gelu": True}),
        (130, 4304, 72, Form(64, 64, 64, 3, 4, 4), {"bias": True}),
        (65, 2047, 33, Form(64, 128, 64, 4, 4, 2), {}),
        (300, 33, 1000, Form(128, 128, 64, 4, 8), {"bias": True, "gelu": True}),
    ]
    return [
        *(
            norm_case(kernel, "", E, rows)
            for kernel in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
            for E, rows in norms
        ),
        *(geglu_case(f"{rows} x {M}", rows, M) for rows, M in ((17, 33), (1, 2047), (65, 4304), (3, 1))),
        *(rope_case(f"{B} x {T}, heads {n}", B, T, n, capacity=T + 13) for B, T, n in ropes),
        *(qkv_case(f"{rows} rows of {E}, heads {n}", rows, E, n, *kind) for rows, E, n, kind in qkvs),
        *(project_case(f"{rows} rows, {i} to {o}", rows, i, o, *kind) for rows, i, o, kind in projections),
        *(gate_up_case(f"{rows} rows, {E} to {M}", rows, E, M, *kind) for rows, E, M, kind in mlps),
        *(head_case(f"{rows} rows, {E} to {V}", rows, E, V, *kind) for rows, E, V, kind in heads),
        *(
            next_case(f"{rows} rows of {E}{', given' * given}", rows, E, D, V, window, given)
            for rows, E, D, V, window, given in tokens
        ),
        *chain.from_iterable(sampling_cases(*sizes) for sizes in ((2, 3001), (1, 7), (3, 2048))),
        *(
            linear_case(f"{rows} rows, {i} to {o}, {form}", rows, i, o, form, **options)
            for rows, i, o, form, options in linears
        ),
        *odd_prefills(),
        decode_case("a short and a full row, D 24", [1, 17], 17, (4, 2, 24)),
        decode_case("lengths at every edge, D 256", [1, 31, 32, 33, 640, 700], 700, (8, 1, 256)),
        decode_case("length 1 in a long cache, D 72", [1], 1500, (3, 3, 72)),
        decode_case(
            "window and softcap, D 256", [5, 130, 700], 700, (8, 4, 256), starts=[0, 129, 333], softcap=50.0
        ),
        decode_case(
            "window, D 128, other scale", [65, 300], 300, (32, 16, 128), starts=[60, 0], scale=144**-0.5
        ),
        decode_case("D 20", [2, 65, 17], 65, (8, 1, 20)),
    ]


def odd_prefills() -> list[Case]:
    """The odd cases of prefill_attention: limits that differ from row to row, histories and windows."""
    after_history = [[max(p, 36 + t) for t in range(65)] for p in (36, 80)]
    causal = [[max(p, t + 1) for t in range(65)] for p in (7, 64)]
    gemma_2: dict[str, Any] = {"softcap": 50.0, "scale": 144**-0.5}
    limits, starts = [[70] * 130, [130] * 130], [[min(t, 69) for t in range(130)]] * 2
    window = [[max(0, t - 20) for t in range(130)]] * 2
    return [
        prefill_case("two short rows, D 24", 2, 5, (4, 2, 24), limits=[[2] * 5, [5] * 5]),
        prefill_case("ragged prefixes, D 24", 3, 17, (4, 2, 24), limits=[[n] * 17 for n in (1, 9, 17)]),
        prefill_case("ragged prefixes, D 72", 3, 130, (3, 3, 72), limits=[[n] * 130 for n in (3, 65, 130)]),
        prefill_case("causal suffix after a history, D 20", 2, 65, (8, 1, 20), S=100, limits=after_history),
        prefill_case("causal suffix, D 256", 2, 65, (8, 1, 256), limits=causal),
        prefill_case("window and softcap, D 256", 2, 130, (8, 4, 256), starts=window, **gemma_2),
        prefill_case("window, ragged, D 128", 2, 130, (4, 2, 128), limits=limits, starts=starts),
        prefill_case("one query, D 72", 2, 1, (4, 2, 72), S=17, limits=[[1], [17]]),
    ]
