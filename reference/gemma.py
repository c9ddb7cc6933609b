"""The decoder of Gemma (Gemma Team 2024, arXiv:2403.08295) and of Gemma 2 (arXiv:2408.00118). There is no
cache: each pass computes the whole sequence, (B, T, E) -> (B, T, V)."""

import math
from dataclasses import replace

import numpy as np

from ..config import TextConfig
from .layers import attention, gelu_tanh, linear, rms_norm, rope, softcap
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
    scores = {"scale": config.query_pre_attn_scalar**-0.5, "cap": config.attn_logit_softcapping}
    context = (p / "o_proj").emit(attention(q, k, v, p, mask, **scores), ".input")
    return linear(context, p / "o_proj")


def mlp(x: Array, p: Params) -> Array:
    """GeGLU: Shazeer 2020, arXiv:2002.05202."""
    gate, up = linear(x, p / "gate_proj"), linear(x, p / "up_proj")
    hidden = (p / "down_proj").emit(gelu_tanh(gate) * up, ".input")
    return linear(hidden, p / "down_proj")


def decoder_layer(x: Array, p: Params, positions: Array, mask: Array, config: TextConfig) -> Array:
    """Gemma 2 normalises the output of each branch too, and has another name for the norm before the MLP."""
    eps, after_attn = config.rms_norm_eps, p / "post_attention_layernorm"
    before_mlp = p / "pre_feedforward_layernorm" if config.post_norms else after_attn
    branch = self_attn(rms_norm(x, p / "input_layernorm", eps), p / "self_attn", positions, mask, config)
    if config.post_norms:
        branch = rms_norm(after_attn.emit(branch, ".input"), after_attn, eps)
    x = before_mlp.emit(x + branch, ".input")
    branch = mlp(rms_norm(x, before_mlp, eps), p / "mlp")
    if config.post_norms:
        branch = rms_norm(branch, p / "post_feedforward_layernorm", eps)
    return p.emit(x + branch)


def within(window: int, mask: Array, positions: Array, mask_ar: Array) -> Array:
    """The mask of a layer in which a token sees only the last `window` tokens, itself included; tokens of the
    prefix still see the whole prefix. (B, T, T), (B, T) twice -> (B, T, T)."""
    near = positions[:, :, None] - positions[:, None, :] < window
    return mask & (near | (np.cumsum(mask_ar, axis=1) == 0)[:, :, None])


def model(x: Array, p: Params, positions: Array, mask: Array, mask_ar: Array, config: TextConfig) -> Array:
    """(B, T, E) -> (B, T, E)."""
    for i in range(config.num_hidden_layers):
        window = config.window(i)
        seen = mask if window is None else within(window, mask, positions, mask_ar)
        x = decoder_layer(x, p / "layers" / i, positions, seen, config)
    return rms_norm(x, p / "norm", config.rms_norm_eps)


def lm_head(x: Array, p: Params, config: TextConfig) -> Array:  # (B, T, E) -> (B, T, V)
    """The logits. p is the embedding where the head is tied to it."""
    logits = np.concatenate([p.product(x, rows.T) for rows in p.blocks("weight")], axis=-1)
    if config.final_logit_softcapping is not None:
        logits = softcap(logits, config.final_logit_softcapping)
    return replace(p, name="logits").emit(logits)
