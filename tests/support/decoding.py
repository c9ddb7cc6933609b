"""The two halves of a decode step, the logits and the appended token; and the prefill."""

import torch

from paligemma.decode_state import DecodeState
from paligemma.model import PaliGemma


def logits_of_next(model: PaliGemma, state: DecodeState) -> torch.Tensor:  # -> (B, V)
    buffers = state.buffers
    with model.computing(len(state.row)):
        return model.next_logits(state.cache, buffers.x, state.next_positions(), buffers.argmax_scratch)


def append(model: PaliGemma, state: DecodeState, logits: torch.Tensor, tokens=None) -> None:  # (B, V), (B,)
    """Append these tokens, or without them the ones chosen from the logits."""
    with model.computing(len(state.row)):
        state.append(logits, model.table, tokens)


def prefill(model: PaliGemma, state: DecodeState, *inputs) -> torch.Tensor:  # -> (B, V)
    """The logits of the first token after these inputs (as in `forward`)."""
    batch, pixel_values = model.unpad(*inputs)
    with model.computing(batch.input_ids.numel()):
        return model.first_logits(state.cache, batch, pixel_values, state.buffers.argmax_scratch)
