"""Gemma's decoder, and Gemma 2's, beside reference/gemma.py. Module names are the checkpoint's."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .config import TextConfig
from .kv_cache import KVCache
from .layers import AddRMSNorm, Linear, RMSNorm, parameter
from .ops import Sum


class Places(NamedTuple):
    """Where the tokens of one pass stand; the same for every layer."""

    positions: Tensor  # (B, T) in the row's cache
    rotation: Tensor  # (2, B, T, D/2) float32, cos and sin of the rotary angles there
    seen: dict[int | None, ops.Seen]  # by a layer's window, which positions each token sees


class Embedding(nn.Module):
    """The token table, which is the output head as well."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.weight, self.weight_scale = parameter(config.vocab_size, config.hidden_size), None

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, E)
        return ops.embed(input_ids, self.weight)


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig, layer: int, quantize: str | None):
        super().__init__()
        E, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer, self.head_dim, self.window = layer, D, config.window(layer)
        self.scale, self.softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        self.q_proj = Linear(E, H * D, quantize=quantize)
        self.k_proj = Linear(E, K * D, quantize=quantize)
        self.v_proj = Linear(E, K * D, quantize=quantize)
        self.o_proj = Linear(H * D, E, quantize=quantize)

    def forward(self, x: Tensor | Sum, norm: AddRMSNorm, cache: KVCache, places: Places, post: RMSNorm | None) -> Tensor | Sum:  # (B, T, E) -> (B, T, E)
        keys, values = cache.layer(self.layer)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, x = ops.norm_qkv_rope(x, norm, projections, places.rotation, places.positions, keys, values)
        attended = ops.attention(q, keys, values, places.seen[self.window], self.scale, self.softcap, cache.tickets)
        return ops.project_add(attended, self.o_proj, x, post)


class MLP(nn.Module):
    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        E, M = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (Linear(*sizes, quantize=quantize) for sizes in ((E, M), (E, M), (M, E)))

    def forward(self, x: Tensor | Sum, norm: AddRMSNorm, post: RMSNorm | None) -> Tensor | Sum:  # (B, T, E) -> (B, T, E)
        hidden, x = ops.norm_geglu(x, norm, self.gate_proj, self.up_proj)
        return ops.project_add(hidden, self.down_proj, x, post)


class DecoderLayer(nn.Module):
    """Gemma 2 normalises what a branch returns as well; there, the norm before the MLP goes by another name."""

    def __init__(self, config: TextConfig, layer: int, quantize: str | None):
        super().__init__()
        self.input_layernorm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer, quantize)
        size, eps, self.post_norms = config.hidden_size, config.rms_norm_eps, config.post_norms
        if config.post_norms:
            self.post_attention_layernorm, self.post_feedforward_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
            self.pre_feedforward_layernorm = AddRMSNorm(size, eps)
        else:
            self.post_attention_layernorm = AddRMSNorm(size, eps)
        self.mlp = MLP(config, quantize)

    def forward(self, x: Tensor | Sum, cache: KVCache, places: Places) -> Tensor | Sum:  # (B, T, E) -> (B, T, E)
        if self.post_norms:
            x = self.self_attn(x, self.input_layernorm, cache, places, self.post_attention_layernorm)
            return self.mlp(x, self.pre_feedforward_layernorm, self.post_feedforward_layernorm)
        x = self.self_attn(x, self.input_layernorm, cache, places, None)
        return self.mlp(x, self.post_attention_layernorm, None)


class Model(nn.Module):
    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        self.windows = {config.window(i) for i in range(config.num_hidden_layers)}
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, quantize) for i in range(config.num_hidden_layers))
        self.norm = AddRMSNorm(config.hidden_size, config.rms_norm_eps)  # which the head begins with

    def forward(self, x: Tensor, cache: KVCache, places: Places) -> Tensor | Sum:  # (B, T, E) -> (B, T, E), appended to the cache
        for layer in self.layers:
            x = layer(x, cache, places)
        return x

    def places(self, cache: KVCache, T: int) -> Places:
        """Of the next T tokens of each row, for which the cache makes room."""
        cache.advance(T)
        positions = cache.length[:, None] + torch.arange(T, device=cache.length.device)
        seen = {window: ops.visible(positions, cache.prefix, cache.used, window) for window in self.windows}
        return Places(positions, cache.rotation[:, positions], seen)


class LanguageModel(nn.Module):
    """With its output head, which is the token table unless `head` says that it has a weight of its own. An 8-bit head is a copy of either."""

    def __init__(self, config: TextConfig, quantize: str | None = None, head: bool = False):
        super().__init__()
        self.model = Model(config, quantize)
        self.softcap = config.final_logit_softcapping
        if quantize or head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantize=quantize)

    def logits(self, x: Tensor | Sum, best: Tensor | None = None) -> Tensor:  # (..., E) -> (..., V) float32
        """With `best`, the kernel for few rows leaves their argmax there; see ops.next_token."""
        head = self.lm_head if "lm_head" in self._modules else self.model.embed_tokens
        return ops.norm_head(x, self.model.norm, head.weight, head.weight_scale, self.softcap, best)
