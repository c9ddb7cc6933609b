"""What the training lessens: how wrong the vision tower is about each patch, and how unlikely the right
answers are.

All of it is computed by the model that answers in production, on its torch path."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import fused, ops, torch_ops
from ..gemma import DecoderLayer, Positions
from ..model import PaliGemma
from . import scenes
from .architecture import LOCS, WIDTH
from .lessons import NOTHING, AnswerBatch, Patches

BOX_WEIGHT = 5.0  # of a distance of 1, which is the picture's side, beside names
LOC_WEIGHT = 0.5  # of coordinates, beside words


class Heads(nn.Module):
    """What the first stage reads off each patch."""

    def __init__(self):
        super().__init__()
        self.kind = nn.Linear(WIDTH, len(scenes.KINDS) + 1)
        self.colour = nn.Linear(WIDTH, len(scenes.COLOURS) + 1)
        self.box = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, truth: Patches) -> tuple[Tensor, dict[str, float]]:  # (N, P, W)
        """The loss, in which shapes weigh as much as the ground between them; accuracy on shapes, and
        distance of boxes in units."""
        there = truth.kind < len(scenes.KINDS)
        kinds, colours, boxes = self.kind(x), self.colour(x), self.box(x[there]).sigmoid()
        named = F.cross_entropy(kinds.flatten(0, 1), truth.kind.flatten(), reduction="none")
        named = (
            named + F.cross_entropy(colours.flatten(0, 1), truth.colour.flatten(), reduction="none")
        ).view_as(there)
        off = (boxes - truth.box[there]).abs().mean()
        loss = 0.5 * named[there].mean() + 0.5 * named[~there].mean() + BOX_WEIGHT * off
        return loss, {
            "kind": float((kinds.argmax(-1) == truth.kind)[there].float().mean()),
            "box": float(off.detach()) * scenes.UNITS,
        }


class FreshCache:
    """A key/value cache for one pass with gradients: every layer writes to its own tensors."""

    counters = None

    def __init__(self, *shape: int):
        self.shape = shape

    def layer(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape), torch.zeros(self.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, *unused: None
) -> Tensor:
    """What ops.attention computes, written out: the gradient of torch's fused attention takes half of a step
    on a CPU.

    The mask (B, T, S) is of numbers to add to the scores, 0 or -inf."""
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    rows = (
        (q * (D**-0.5 if scale is None else scale))
        .unflatten(2, (K, H // K))
        .transpose(1, 2)
        .reshape(B * K, T * (H // K), D)
    )
    k, v = (x.transpose(1, 2).reshape(B * K, S, D) for x in (k, v))
    if mask is None:
        scores = torch.bmm(rows, k.transpose(1, 2))
    else:
        scores = torch.baddbmm(
            mask.repeat_interleave(K, dim=0).repeat_interleave(H // K, dim=1), rows, k.transpose(1, 2)
        )
    return torch.bmm(scores.softmax(dim=-1), v).view(B, K, T, H // K, D).transpose(1, 2).flatten(2)


@contextmanager
def trainable_attention() -> Iterator[None]:
    with mock.patch.object(ops, "attention", attention):
        yield


def answers(
    model: PaliGemma, pictures: Tensor, rows: AnswerBatch
) -> Tensor:  # (N, P, E) -> (tokens to be answered, E)
    """Hidden states of the positions that answer: the decoder as it runs in production, but for its last
    layer, which need not compute the others."""
    decoder, text = model.language_model.model, model.config.text_config
    x = torch.cat([pictures[rows.scene], decoder.embed_tokens(rows.input_ids)], dim=1)
    (B, T, _), P = x.shape, pictures.shape[1]
    cache = FreshCache(B, T, text.num_key_value_heads, text.head_dim)
    index = torch.arange(T).expand(B, T)
    seen = (
        torch.arange(T) < torch.maximum(index + 1, rows.prefix[:, None] + P)[..., None]
    )  # (B, T, T), image and prompt by all
    mask = torch.zeros(B, T, T).masked_fill_(~seen, -torch.inf)
    positions = Positions(
        index, torch_ops.rope_table(T, text.head_dim, text.rope_theta, x.device)[:, index], {None: mask}
    )  # pyright: ignore[reportArgumentType]  for the attention above
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
    """Cross-entropy of words, and of coordinates with a target as wide as `blur` bins."""
    hidden = torch.cat([answers(model, pictures, rows) for rows in batches])
    target, coordinate, weight = (
        torch.cat([getattr(rows, name)[rows.target != NOTHING] for rows in batches])
        for name in ("target", "coordinate", "weight")
    )
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
    excess = float(
        loc_loss.detach() + torch.special.xlogy(wanted, wanted).sum(dim=-1).mean()
    )  # over the target's own entropy
    off = float((locs.argmax(-1) + 0.5 - first_loc - coordinate[is_loc]).abs().median())
    return word_loss + LOC_WEIGHT * loc_loss, {
        "words": float(word_loss.detach()),
        "right": accuracy,
        "locs": excess,
        "bins": off,
    }
