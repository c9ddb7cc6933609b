"""4-bit weights as they are stored: the plain formula.

    w[n, k] = (code[n, k] - 8) * scale[n, k // 32]

Word c = 0..3 of group g of a row holds, in its bits 4 i to 4 i + 3, the code of k = 32 g + 4 i + c, for
i = 0..7."""

import numpy as np

Array = np.ndarray


def codes(words: Array) -> Array:  # (N, K // 8) int32 -> (N, K), 0 to 15
    N, count = words.shape
    out = np.zeros((N, 8 * count), np.int64)
    for k in range(8 * count):
        g, i, c = k // 32, k % 32 // 4, k % 4
        word = words[:, 4 * g + c].astype(np.int64) % 2**32
        out[:, k] = word // 16**i % 16
    return out


def dequantized(words: Array, scale: Array) -> Array:  # (N, K // 8), (N, K // 32) -> (N, K) float64
    return (codes(words) - 8) * np.repeat(scale.astype(np.float64), 32, axis=1)
