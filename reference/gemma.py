"""Gemma's decoder: Gemma Team 2024, arXiv:2403.08295. No cache: the whole sequence, every time. (B, T, E) -> (B, T, V)."""

import math
from dataclasses import replace

import numpy as np

from ..config import TextConfig
from .layers import attention, gelu_tanh, linear, rms_norm, rope
from .params import Array, Params


def embed_tokens(input_ids: Array, p: Params, config: TextConfig) -> Array:  # (B, T) -> (B, T, E)
    return p.emit(p.rows("weight", input_ids) * math.sqrt(config.hidden_size))


def self_attn(x: Array, p: Params, positions: Array, mask: Array, config: TextConfig) -> Array:
    B, T, _ = x.shape
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = linear(x, p / "q_proj").reshape(B, T, H, D)
    k = linear(x, p / "k_proj").reshape(B, T, K, D)
    v = linear(x, p / "v_proj").reshape(B, T, K, D)
    q = (p / "q_rope").emit(rope(q, positions, config.rope_theta))
    k = (p / "k_rope").emit(rope(k, positions, config.rope_theta))
    context = (p / "o_proj").emit(attention(q, k, v, mask), ".input")
    return linear(context, p / "o_proj")


def mlp(x: Array, p: Params) -> Array:
    """GeGLU: Shazeer 2020, arXiv:2002.05202."""
    gate, up = linear(x, p / "gate_proj"), linear(x, p / "up_proj")
    hidden = (p / "down_proj").emit(gelu_tanh(gate) * up, ".input")
    return linear(hidden, p / "down_proj")


def decoder_layer(x: Array, p: Params, positions: Array, mask: Array, config: TextConfig) -> Array:
    eps = config.rms_norm_eps
    x = x + self_attn(rms_norm(x, p / "input_layernorm", eps), p / "self_attn", positions, mask, config)
    x = (p / "post_attention_layernorm").emit(x, ".input")
    return p.emit(x + mlp(rms_norm(x, p / "post_attention_layernorm", eps), p / "mlp"))


def model(x: Array, p: Params, positions: Array, mask: Array, config: TextConfig) -> Array:  # (B, T, E) -> (B, T, E)
    for i in range(config.num_hidden_layers):
        x = decoder_layer(x, p / "layers" / i, positions, mask, config)
    return rms_norm(x, p / "norm", config.rms_norm_eps)


def lm_head(x: Array, p: Params) -> Array:  # (B, T, E) -> (B, T, V), tied to the embedding
    logits = np.concatenate([x @ rows.T for rows in p.blocks("weight")], axis=-1)
    return replace(p, name="logits").emit(logits)
