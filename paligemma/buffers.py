"""The tensors that a decode step reads and writes. They keep their addresses, so that all tokens need the
same launches."""

from typing import NamedTuple

from torch import Tensor

SAMPLING_SCRATCH = 4096 + 8  # numbers per row: the mass of each interval of the logits, and kernels' counts


class DecodeBuffers(NamedTuple):
    """The output so far, and the input of the next decode step."""

    output_ids: Tensor  # (N, B) int64, the tokens of each row
    output_length: Tensor  # (B,) int64, the number of tokens of each row
    x: Tensor  # (B, 1, E), the embedding of the last token
    position: Tensor  # (B, 1) int64, its position in the row's cache
    rotation: Tensor  # (2, B, 1, D/2) float32, the cosines and sines of that position
    limit: Tensor  # (B, 1) int64: the token attends to positions below this one,
    start: Tensor | None  # (B, 1) int64: and, in layers with a window, from this one on
    argmax_scratch: Tensor  # (B, 64) int64, partial argmaxes: 64, because thousands of programs write them


class SamplingBuffers(NamedTuple):
    """The parameters of sampling, for each row."""

    temperature: Tensor  # (B,) float64; sampling.GREEDY, with `uniform` 0, chooses the most probable token
    top_p: Tensor  # (B,) float64
    uniform: Tensor  # (B, N) float64, a random number in [0, 1) for each token
    scratch: Tensor  # (B, SAMPLING_SCRATCH) int64, sums of the kernels; zeros before and after sampling
