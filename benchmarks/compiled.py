"""Gemma's decoder compiled by torch.compile, the peer to beat. It uses this project's weights, and none of
its kernels.

It follows gpt-fast (github.com/meta-pytorch/gpt-fast): a cache of fixed size, one product for q, k and v and
one for gate and up, one compiled graph that also chooses the token, CUDA graphs, and a search over kernel
configurations. The search also turns a product of one row into a sum that reads the weight at the speed of
memory. It supports PaliGemma 1 only: no softcap, no window, no post-norms.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.geglu import plain_geglu
from benchmarks.cases.norms import plain_norm
from benchmarks.cases.rope import turned
from paligemma.kv_cache import KVCache
from paligemma.model import PaliGemma
from paligemma.packing import packed
from paligemma.torch_ops import rope_table


class Product(nn.Module):
    """One product for several linear layers whose weights are concatenated. The scales of 8-bit weights are
    applied after the product."""

    def __init__(self, *layers: Any):
        super().__init__()
        weight = packed(*(layer.weight for layer in layers))
        scales = [layer.weight_scale for layer in layers if layer.weight_scale is not None]
        scale = packed(*scales) if scales else None
        assert weight is not None
        self.weight, self.scale = nn.Buffer(weight), None if scale is None else nn.Buffer(scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


class Layer(nn.Module):
    def __init__(self, layer: Any, shape: tuple[int, ...], heads: int, scale: float, sdpa: bool):
        super().__init__()
        attention, mlp, like = layer.self_attn, layer.mlp, layer.input_layernorm.weight
        self.heads, self.scale, self.sdpa = heads, scale, sdpa
        self.norm, self.norm_mlp = nn.Buffer(like), nn.Buffer(layer.post_attention_layernorm.weight)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = Product(attention.o_proj)
        self.gate_up, self.down = Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)
        self.keys, self.values = (nn.Buffer(like.new_zeros(shape)) for _ in range(2))  # (B, K, S, D)

    # (B, 1, E) -> (B, 1, E)
    def forward(self, x: Tensor, rotation: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        (B, K, _, D), H = self.keys.shape, self.heads
        q, k, v = self.qkv(plain_norm(x, self.norm)).unflatten(-1, (-1, D)).split([H, K, K], dim=2)
        q, k = (turned(part.float(), rotation).to(x.dtype) for part in (q, k))
        self.keys[:, :, position], self.values[:, :, position] = k.transpose(1, 2), v.transpose(1, 2)
        if self.sdpa:
            both, mask = (self.keys, self.values), seen[None, None, None]
            k, v = (part[:, :, None].expand(-1, -1, H // K, -1, -1).flatten(1, 2) for part in both)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=self.scale)
        else:  # two products, for all query heads of a key head at once
            scores = (q.view(B, K, H // K, D) @ self.keys.transpose(2, 3)).float() * self.scale
            out = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1).to(x.dtype) @ self.values
        x = x + self.o(out.reshape(B, 1, H * D))
        return x + self.down(plain_geglu(*self.gate_up(plain_norm(x, self.norm_mlp)).chunk(2, dim=-1)))


class Decoder(nn.Module):
    """The decoder of `model` with a cache of its own. sdpa: use torch's scaled_dot_product_attention."""

    def __init__(self, model: PaliGemma, batch: int, capacity: int, sdpa: bool = True):
        super().__init__()
        t, language = model.config.text_config, model.language_model
        layers: Any = language.model.layers
        assert not t.post_norms, "Gemma 2"
        shape = (batch, t.num_key_value_heads, capacity, t.head_dim)
        H, scale = t.num_attention_heads, t.query_pre_attn_scalar**-0.5
        embedding = language.model.embed_tokens
        self.layers = nn.ModuleList(Layer(layer, shape, H, scale, sdpa) for layer in layers)
        self.table, self.norm = nn.Buffer(embedding.weight), nn.Buffer(language.model.norm.weight)
        self.head = Product(language.lm_head if "lm_head" in language._modules else embedding)
        self.rotation = nn.Buffer(rope_table(capacity, t.head_dim, t.rope_theta, model.device))

    def logits(self, tokens: Tensor, position: Tensor) -> Tensor:  # (B, 1), (1,) -> (B, V) float32
        x = F.embedding(tokens, self.table)
        x = (x.float() * math.sqrt(x.shape[-1])).to(x.dtype)
        seen = torch.arange(self.rotation.shape[1], device=x.device) <= position
        for layer in self.layers:
            x = layer(x, self.rotation[:, position][:, None], position, seen)
        return self.head(plain_norm(x, self.norm)).float()[:, 0]

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:  # (B, 1), (1,) -> (B, 1)
        return self.logits(tokens, position).argmax(dim=-1, keepdim=True)

    def fill(self, cache: KVCache) -> None:
        """Copy the keys and values of a prefill."""
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            for mine, part in zip((layer.keys, layer.values), cache.layer(i), strict=True):
                mine[:, :, : part.shape[1]].copy_(part.transpose(1, 2))


def compiled(decoder: Decoder) -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()  # drops what was compiled for another batch or capacity
    # the first option is the effect of mode="reduce-overhead"
    options: dict[str, Any] = {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    return torch.compile(decoder, fullgraph=True, dynamic=False, options=options)


def generate(
    model: PaliGemma, decoder: Decoder, step: Callable[[Tensor, Tensor], Tensor],
    inputs: dict[str, Tensor], new: int,
) -> Tensor:  # fmt: skip
    """Greedy tokens (B, new) for rows of equal length, without a stop at <eos>. The model's prefill computes
    the first token, `step` the others."""
    rows = model.unpad(inputs["input_ids"], inputs["pixel_values"])[0].to(model.device)
    B, T = rows.input_ids.shape
    cache = KVCache(model.config.text_config, B, T, model.dtype, model.device)
    hidden = model.hidden(rows, inputs["pixel_values"], cache)
    decoder.fill(cache)
    tokens, position = [model.logits(hidden[:, -1]).argmax(dim=-1, keepdim=True)], rows.length[:1].clone()
    for _ in range(new - 1):
        tokens.append(step(tokens[-1], position).clone())  # the next step overwrites it
        position += 1
    return torch.cat(tokens, dim=1)
