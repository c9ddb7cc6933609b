"""Decodes the 16 codes of a mask into the mask: the decoder of Ning et al. 2023, arXiv:2301.02229, with
big_vision's weights.

Follows google-research/big_vision (evaluators/proj/paligemma/transfers/segmentation.py). Arithmetic is
float64, on N masks at a time, (N, height, width, channels). Kernels have the layout of the file: (out, in, k,
k), and (in, out, k, k) for transposed convolutions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..answers import mask_weights
from .params import Array

Weights = dict[str, Array]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def conv(x: Array, w: Weights, name: str) -> Array:  # (N, y, x, in) -> (N, y, x, out)
    """A convolution of odd size k, padded with zeros to keep height and width: in each direction, y[i] = sum
    over a of kernel[a] x[i + a - k // 2]."""
    kernel = w[f"{name}.weight"]
    _, Y, X, _ = x.shape
    k = kernel.shape[2]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
    taps = (padded[:, a : a + Y, b : b + X] @ kernel[:, :, a, b].T for a in range(k) for b in range(k))
    return w[f"{name}.bias"] + sum(taps)


def conv_transpose(x: Array, w: Weights, name: str) -> Array:  # (N, y, x, in) -> (N, 2y, 2x, out)
    """Size 4, stride 2: in each direction, x[i] adds kernel[a] x[i] to y[2i + a - 1], for a from 0 to 3, if
    that is inside."""
    kernel = w[f"{name}.weight"]
    N, Y, X, _ = x.shape
    y = np.zeros((N, 2 * Y + 2, 2 * X + 2, kernel.shape[1]))
    for a in range(4):
        for b in range(4):
            y[:, a : a + 2 * Y : 2, b : b + 2 * X : 2] += x @ kernel[:, :, a, b]
    return y[:, 1:-1, 1:-1] + w[f"{name}.bias"]


def res_block(x: Array, w: Weights, name: str) -> Array:
    y = relu(conv(x, w, f"{name}.0"))
    y = relu(conv(y, w, f"{name}.2"))
    return x + conv(y, w, f"{name}.4")


def decode(codes: Array, w: Weights) -> Array:  # (N, 16) -> (N, 64, 64)
    """Masks with values of about -1 to 1, above 0 where the object is. The codes are a 4 x 4 grid, row by
    row."""
    codebook = w[mask_weights.EMBEDDING]
    x = codebook[codes].reshape(len(codes), 4, 4, codebook.shape[1])
    x = relu(conv(x, w, "decoder.0"))
    for block in ("decoder.2.net", "decoder.3.net"):
        x = res_block(x, w, block)
    for layer in ("decoder.4", "decoder.6", "decoder.8", "decoder.10"):
        x = relu(conv_transpose(x, w, layer))
    return conv(x, w, "decoder.12")[..., 0]


def load(path: str | Path | None = None, *, local_files_only: bool = False) -> Callable[[Array], Array]:
    """`decode` with the weights of vae-oid.npz: the file at `path`, or the file that is downloaded on first
    use."""
    weights = mask_weights.read(mask_weights.find(path, local_files_only=local_files_only))
    return partial(decode, w={name: array.astype(np.float64) for name, array in weights.items()})
