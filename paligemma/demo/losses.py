"""The losses of the training: the error of the vision tower on each patch, and the cross-entropy of the right
answers. They are computed with the model's inference code, on its torch path."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import fused, ops, torch_ops
from ..attention_range import Positions
from ..gemma import DecoderLayer
from ..model import PaliGemma
from . import scenes
from .architecture import LOCS, WIDTH
from .lessons import NOTHING, AnswerBatch, Patches

BOX_WEIGHT = 5.0  # weight of the box's error, in sides of the picture, relative to that of kind and colour
LOC_WEIGHT = 0.5  # weight of coordinates relative to words


class Heads(nn.Module):
    """Linear heads that predict kind, colour and box of the shape on each patch."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Linear(WIDTH, len(scenes.KINDS) + 1)
        self.colour = nn.Linear(WIDTH, len(scenes.COLOURS) + 1)
        self.box = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, truth: Patches) -> tuple[Tensor, dict[str, float]]:  # (N, P, W)
        """The loss, in which patches with and without a shape have equal weight; and, for patches with a
        shape, the accuracy of kinds and the mean error of boxes in units."""
        there = truth.kind < len(scenes.KINDS)
        kinds, colours, boxes = self.kind(x), self.colour(x), self.box(x[there]).sigmoid()
        kind = F.cross_entropy(kinds.flatten(0, 1), truth.kind.flatten(), reduction="none")
        colour = F.cross_entropy(colours.flatten(0, 1), truth.colour.flatten(), reduction="none")
        named = (kind + colour).view_as(there)
        off = (boxes - truth.box[there]).abs().mean()
        loss = 0.5 * named[there].mean() + 0.5 * named[~there].mean() + BOX_WEIGHT * off
        accuracy = float((kinds.argmax(-1) == truth.kind)[there].float().mean())
        return loss, {"kind": accuracy, "box": float(off.detach()) * scenes.UNITS}


class FreshCache:
    """A key/value cache for one pass with gradients: every layer writes to new tensors."""

    counters = None

    def __init__(self, *shape: int):
        self.shape = shape

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape), torch.zeros(self.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, *unused: None
) -> Tensor:
    """The attention of ops.attention in separate operations: on a CPU the gradient of torch's fused attention
    would take half of a step. The mask (B, T, S) is added to the scores; its values are 0 and -inf."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    G = H // K
    scaled = (q * (D**-0.5 if scale is None else scale)).unflatten(2, (K, G))
    rows = scaled.transpose(1, 2).reshape(B * K, T * G, D)
    k, v = (x.transpose(1, 2).reshape(B * K, S, D) for x in (k, v))
    if mask is None:
        scores = torch.bmm(rows, k.transpose(1, 2))
    else:
        added = mask.repeat_interleave(K, dim=0).repeat_interleave(G, dim=1)
        scores = torch.baddbmm(added, rows, k.transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v).view(B, K, T, G, D).transpose(1, 2).flatten(2)


@contextmanager
def trainable_attention() -> Iterator[None]:
    """Inside this block the model computes with `attention` above."""
    with mock.patch.object(ops, "attention", attention):
        yield


def answers(model: PaliGemma, pictures: Tensor, rows: AnswerBatch) -> Tensor:  # (N, P, E) -> (tokens, E)
    """Hidden states of the positions that predict the answers. The decoder runs as in inference,
    except for its last layer, which computes these positions only."""
    decoder, text = model.language_model.model, model.config.text_config
    x = torch.cat([pictures[rows.scene], decoder.embed_tokens(rows.input_ids)], dim=1)
    (B, T, _), P = x.shape, pictures.shape[1]
    cache = FreshCache(B, T, text.num_key_value_heads, text.head_dim)
    index = torch.arange(T).expand(B, T)
    visible = torch.maximum(index + 1, rows.prefix[:, None] + P)  # (B, T): all see the image and the prompt
    mask = torch.zeros(B, T, T).masked_fill_(~(torch.arange(T) < visible[..., None]), -torch.inf)
    masks: Any = {None: mask}  # `attention` above takes a mask where ops.attention takes an AttentionRange
    rotation = torch_ops.rope_table(T, text.head_dim, text.rope_theta, x.device)[:, index]
    positions = Positions(index, rotation, masks)
    for layer in decoder.layers[:-1]:
        x = layer(x, cache, positions)

    last, row, where = decoder.layers[-1], torch.arange(B)[:, None], rows.where + P
    assert isinstance(last, DecoderLayer)
    attend, h = last.self_attn, last.input_layernorm(x)
    q, k, v = (project(h).unflatten(-1, (-1, text.head_dim)) for project in attend.qkv)
    keys, values = cache.layer(len(decoder.layers) - 1)
    q = ops.rope(q, k, v, positions.rotation, index, keys, values)
    x = x[row, where] + attend.o_proj(attention(q[row, where], keys, values, mask[row, where]))
    hidden, x = fused.norm_geglu(x, last.post_attention_layernorm, last.mlp.gate_proj, last.mlp.up_proj)
    return fused.resolve(fused.project_add(hidden, last.mlp.down_proj, x, None))[rows.target != NOTHING]


def answer_loss(
    model: PaliGemma, pictures: Tensor, batches: list[AnswerBatch], first_loc: int, blur: float
) -> tuple[Tensor, dict[str, float]]:
    """The cross-entropy of words, plus that of coordinates; and the measured values. The target of a
    coordinate is a Gaussian over the <loc> tokens; blur is its standard deviation in bins."""
    hidden = torch.cat([answers(model, pictures, rows) for rows in batches])

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(rows, name)[rows.target != NOTHING] for rows in batches])

    target, coordinate, weight = map(joined, ("target", "coordinate", "weight"))
    is_loc = ~coordinate.isnan()
    logits = model.language_model.logits(hidden).log_softmax(dim=-1)
    words, right = logits[~is_loc], weight[~is_loc]
    picked = words.gather(1, target[~is_loc, None])[:, 0]
    word_loss = -(picked * right).sum() / right.sum()
    accuracy = float((words.argmax(-1) == target[~is_loc]).float().mean())
    if not is_loc.any():
        return word_loss, {"words": float(word_loss.detach()), "right": accuracy}
    bins = torch.arange(LOCS) + 0.5
    wanted = (-0.5 * ((bins - coordinate[is_loc, None]) / blur).square()).softmax(dim=-1)
    locs = logits[is_loc]
    loc_loss = -(wanted * locs[:, first_loc : first_loc + LOCS]).sum(dim=-1).mean()
    entropy = -torch.special.xlogy(wanted, wanted).sum(dim=-1).mean()  # the least that loc_loss can be
    off = float((locs.argmax(-1) + 0.5 - first_loc - coordinate[is_loc]).abs().median())
    measured = {"words": float(word_loss.detach()), "right": accuracy}
    measured |= {"locs": float(loc_loss.detach() - entropy), "bins": off}
    return word_loss + LOC_WEIGHT * loc_loss, measured
