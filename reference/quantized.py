"""Quantised weights as they are stored: the plain formulas.

    w[n, k] = code[n, k] * scale[n]                     int8 and e4m3; for 4 bits see int4.py

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: Micikevicius et al. 2022, arXiv:2209.05433."""

import numpy as np

from . import int4

Array = np.ndarray


def e4m3(bits: Array) -> Array:  # uint8 -> float64 of the same shape
    sign, exponent, mantissa = bits >> 7, (bits >> 3 & 15).astype(int), (bits & 7).astype(float)
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    small = mantissa / 8 * 2.0**-6
    value = np.where(exponent == 0, small, normal)
    value = np.where((exponent == 15) & (mantissa == 7), np.nan, value)
    return np.where(sign == 1, -value, value)


def int8_rows(codes: Array, scale: Array) -> Array:  # (N, K) int8, (N,) -> (N, K) float64
    return codes.astype(np.float64) * scale[:, None]


def e4m3_rows(codes: Array, scale: Array) -> Array:  # (N, K) uint8, (N,) -> (N, K) float64
    return e4m3(codes) * scale[:, None]


WEIGHTS = {
    "I8": int8_rows,
    "F8_E4M3": e4m3_rows,
    "I32": int4.dequantized,
}  # by safetensors' words for the codes
