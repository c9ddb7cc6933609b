"""What stands between the products of a decode step on a CPU, in Numba: norms, GeGLU, rotation, attention and
residual sums of a few rows.

Tensors of the model are bfloat16, as NumPy arrays of their bits; products are float32, followed by the scales
that they lack, which may be none. Arithmetic is float32."""

import math

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic

from .cpu_gemv import OPTIONS, _load, compiled, narrowed, serial, widened
from .cpu_panels import _address, _number, _store
from .cpu_vectors import LANES, _gelu, _rounded

PART = 64 * LANES  # outputs of a GeGLU or of the head that a thread computes at a time


@intrinsic
def geglu_lanes(_, gate, up, r, n, out):
    """out[r, n + i] of LANES outputs in bfloat16 from the float32 products gate and up."""

    def generate(context, builder, signature, arguments):
        gate, up, out = (
            _address(context, builder, signature, arguments, i, *arguments[2:4]) for i in (0, 1, 4)
        )
        gate, up = (_load(builder, each, _number(0), LANES) for each in (gate, up))
        _store(builder, _rounded(builder, builder.fmul(_gelu(builder, gate), up)), out)
        return context.get_dummy_value()

    return types.void(gate, up, r, n, out), generate


@njit(**OPTIONS)  # machine code of its own is not cached: what calls it holds it
def norm_row(x, weight, eps, out):
    total = np.float32(0)
    for i in range(len(weight)):
        total += widened(x[i]) * widened(x[i])
    factor = np.float32(1 / math.sqrt(total / len(weight) + eps))
    for i in range(len(weight)):
        out[i] = narrowed(widened(x[i]) * factor * (np.float32(1) + widened(weight[i])))


@njit(**OPTIONS)
def scale_row(sums, scale):
    """Multiply products by the scales that they lack, which may be none."""
    for n in range(len(scale)):
        sums[n] *= widened(scale[n])


@serial
def norm_rows(x, weight, eps, out):
    for r in range(len(x)):
        norm_row(x[r], weight, eps, out[r])


@serial
def widen_rows(x, out):
    """x in float32, in the first rows of out."""
    for r in range(len(x)):
        for k in range(x.shape[1]):
            out[r, k] = widened(x[r, k])


@compiled
def geglu_rows(gate, gate_scale, up, up_scale, out, vector):
    """The length of `vector` is LANES: see `cpu_gemv.tile`."""
    N = out.shape[1]
    parts = (N + PART - 1) // PART
    for part in prange(len(out) * parts):
        r, first = part // parts, part % parts * PART
        last = min(first + PART, N)
        scale_row(gate[r, first:last], gate_scale[first:last])
        scale_row(up[r, first:last], up_scale[first:last])
        for n in range(first, last, LANES):
            geglu_lanes(gate, up, r, n, out)


@njit(**OPTIONS)
def rotate(sums, cosines, sines, out):
    """out (heads, D)"""
    heads, D = out.shape
    half = D // 2
    for h in range(heads):
        for i in range(half):
            first, second = sums[h * D + i], sums[h * D + half + i]
            out[h, i] = narrowed(first * cosines[i] - second * sines[i])
            out[h, half + i] = narrowed(second * cosines[i] + first * sines[i])


@serial
def rope_rows(q, q_scale, k, k_scale, v, v_scale, rotation, positions, keys, values, out):
    heads, D = keys.shape[2:]
    for r in range(len(out)):
        scale_row(q[r], q_scale)
        scale_row(k[r], k_scale)
        scale_row(v[r], v_scale)
        cosines, sines, place = rotation[0, r], rotation[1, r], positions[r]
        rotate(q[r], cosines, sines, out[r])
        rotate(k[r], cosines, sines, keys[r, place])
        for h in range(heads):
            for i in range(D):
                values[r, place, h, i] = narrowed(v[r, h * D + i])


@compiled
def attend_rows(q, keys, values, start, limit, scale, softcap, out):
    """Each query head of each row by one thread. softcap: 0 means none."""
    R, H, D = q.shape
    group = H // keys.shape[2]
    for i in prange(R * H):
        r, h = i // H, i % H
        k, first, count = h // group, start[r], limit[r] - start[r]
        scores, query, total = np.empty(count, np.float32), np.empty(D, np.float32), np.zeros(D, np.float32)
        for d in range(D):
            query[d] = widened(q[r, h, d]) * np.float32(scale)
        most = np.float32(-np.inf)
        for s in range(count):
            score = np.float32(0)
            for d in range(D):
                score += query[d] * widened(keys[r, first + s, k, d])
            if softcap > 0:
                score = np.float32(softcap * math.tanh(score / softcap))
            scores[s] = score
            most = max(most, score)
        weights = np.float32(0)
        for s in range(count):
            scores[s] = math.exp(scores[s] - most)
            weights += scores[s]
        for s in range(count):
            for d in range(D):
                total[d] += scores[s] * widened(values[r, first + s, k, d])
        for d in range(D):
            out[r, h * D + d] = narrowed(total[d] / weights)


@serial
def add_rows(sums, scale, residual, weight, eps, out):
    """The residual sum, of the norm of the product if there is a weight of one."""
    for r in range(len(out)):
        scale_row(sums[r], scale)
        for n in range(out.shape[1]):
            out[r, n] = narrowed(sums[r, n])
        if len(weight) > 0:
            norm_row(out[r], weight, eps, out[r])
        for n in range(out.shape[1]):
            out[r, n] = narrowed(widened(residual[r, n]) + widened(out[r, n]))


@compiled
def logits_rows(sums, scale, out):
    """The products in bfloat16, widened to float32."""
    N = out.shape[1]
    parts = (N + PART - 1) // PART
    for part in prange(len(out) * parts):
        r, first = part // parts, part % parts * PART
        last = min(first + PART, N)
        scale_row(sums[r, first:last], scale[first:last])
        for n in range(first, last):
            out[r, n] = widened(narrowed(sums[r, n]))
