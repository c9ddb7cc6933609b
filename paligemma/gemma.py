"""Gemma's decoder, and Gemma 2's, beside reference/gemma.py. Module names are the checkpoint's."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .config import TextConfig
from .kv_cache import KVCache
from .layers import AddRMSNorm, Linear, RMSNorm, parameter


class Places(NamedTuple):
    """Where the tokens of one pass stand; the same for every layer."""

    positions: Tensor  # (B, T) in the row's cache
    rotation: Tensor  # (2, B, T, D/2) float32, cos and sin of the rotary angles there
    seen: dict[int | None, ops.Seen]  # by a layer's window, which positions each token sees


class Embedding(nn.Module):
    """The token table, which is the output head as well."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.weight = parameter(config.vocab_size, config.hidden_size)

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

    def forward(self, x: Tensor, cache: KVCache, places: Places) -> Tensor:  # (B, T, E) -> (B, T, E)
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        keys, values = cache.layer(self.layer)
        q = ops.rope(q, k, v, places.rotation, places.positions, keys, values)
        return self.o_proj(ops.attention(q, keys, values, places.seen[self.window], self.scale, self.softcap))


class MLP(nn.Module):
    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        E, M = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (Linear(*sizes, quantize=quantize) for sizes in ((E, M), (E, M), (M, E)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.geglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Gemma 2 normalises what a branch returns as well; there, the norm before the MLP goes by another name."""

    def __init__(self, config: TextConfig, layer: int, quantize: str | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer, quantize)
        size, eps, self.post_norms = config.hidden_size, config.rms_norm_eps, config.post_norms
        if config.post_norms:
            self.post_attention_layernorm, self.post_feedforward_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
            self.pre_feedforward_layernorm = AddRMSNorm(size, eps)
        else:
            self.post_attention_layernorm = AddRMSNorm(size, eps)
        self.mlp = MLP(config, quantize)

    def forward(self, x: Tensor, cache: KVCache, places: Places) -> Tensor:  # (B, T, E) -> (B, T, E)
        attended = self.self_attn(self.input_layernorm(x), cache, places)
        if self.post_norms:
            normed, x = self.pre_feedforward_layernorm(self.post_attention_layernorm(attended), x)
            return x + self.post_feedforward_layernorm(self.mlp(normed))
        normed, x = self.post_attention_layernorm(attended, x)
        return x + self.mlp(normed)


class Model(nn.Module):
    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.windows = {config.window(i) for i in range(config.num_hidden_layers)}
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, quantize) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:  # (B, T, E) -> (B, T, E), appended to the cache
        T = x.shape[1]
        cache.advance(T)
        positions = cache.length[:, None] + torch.arange(T, device=x.device)
        table = ops.rope_table(cache.capacity, self.head_dim, self.rope_theta, x.device)
        seen = {window: ops.visible(positions, cache.prefix, cache.used, window) for window in self.windows}
        places = Places(positions, table[:, positions], seen)
        for layer in self.layers:
            x = layer(x, cache, places)
        return self.norm(x)


class LanguageModel(nn.Module):
    """With its output head, which is the token table; of int8, the head is a copy of it."""

    def __init__(self, config: TextConfig, quantize: str | None = None):
        super().__init__()
        self.model = Model(config, quantize)
        self.softcap = config.final_logit_softcapping
        if quantize:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantize=quantize)

    def logits(self, x: Tensor) -> Tensor:  # (..., E) -> (..., V) float32
        head = self._modules.get("lm_head")
        logits = (ops.linear(x, self.model.embed_tokens.weight) if head is None else head(x)).float()
        return logits if self.softcap is None else ops.softcap_(logits, self.softcap)
