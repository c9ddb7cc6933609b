"""The decoder of Gemma and Gemma 2. Read it beside reference/gemma.py. Module names are the checkpoint's."""

import torch
from torch import Tensor, nn

from . import cpu_step, fused, ops
from .attention_range import Positions, visible
from .config import TextConfig
from .fused import Residual
from .kv_cache import KVCache
from .layers import Linear, RMSNorm, parameter
from .quantization import FORMATS


class Embedding(nn.Module):
    """The token table. It is the output head too, unless LanguageModel has an lm_head."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.features, self.weight_scale = config.hidden_size, None
        self.weight = parameter(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, E)
        return ops.embed(input_ids, self.weight)


class SelfAttention(nn.Module):
    """The parameters of a layer's attention."""

    def __init__(self, config: TextConfig, layer: int, quantize: str | None):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.scale, self.softcap = config.query_pre_attn_scalar**-0.5, config.attn_logit_softcapping
        self.window = config.window(layer)
        self.q_proj = Linear(E, H * D, quantize=quantize)
        self.k_proj = Linear(E, K * D, quantize=quantize)
        self.v_proj = Linear(E, K * D, quantize=quantize)
        self.o_proj = Linear(H * D, E, quantize=quantize)

    @property
    def qkv(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class MLP(nn.Module):
    """The parameters of a layer's MLP."""

    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        E, M = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(E, M, quantize=quantize)
        self.up_proj = Linear(E, M, quantize=quantize)
        self.down_proj = Linear(M, E, quantize=quantize)


class DecoderLayer(nn.Module):
    """Five operations: norm, projections and rotation; attention; output projection and residual sum; norm
    and GeGLU; down projection and residual sum. Gemma 2 normalises the output of each branch too, and has
    another name for the norm before the MLP."""

    def __init__(self, config: TextConfig, layer: int, quantize: str | None):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layer, self.post_norms = layer, config.post_norms
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = SelfAttention(config, layer, quantize)
        self.post_attention_layernorm = RMSNorm(size, eps)
        if config.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(size, eps)
            self.post_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config, quantize)

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm | None, RMSNorm, RMSNorm | None]:
        """The norms before and after attention, and before and after the MLP."""
        before_attn, second = self.input_layernorm, self.post_attention_layernorm
        if not self.post_norms:
            return before_attn, None, second, None
        return before_attn, second, self.pre_feedforward_layernorm, self.post_feedforward_layernorm

    def forward(self, x: Residual, cache: KVCache, positions: Positions) -> Residual:
        """(B, T, E) -> (B, T, E)."""
        attn, mlp, (before_attn, after_attn, before_mlp, after_mlp) = self.self_attn, self.mlp, self.norms
        (keys, values), visible = cache.layer(self.layer), positions.visible[attn.window]

        rotation, indices = positions.rotation, positions.indices
        q, x = fused.norm_qkv_rope(x, before_attn, attn.qkv, rotation, indices, keys, values)
        attended = ops.attention(q, keys, values, visible, attn.scale, attn.softcap, cache.counters)
        x = fused.project_add(attended, attn.o_proj, x, after_attn)
        hidden, x = fused.norm_geglu(x, before_mlp, mlp.gate_proj, mlp.up_proj)
        return fused.project_add(hidden, mlp.down_proj, x, after_mlp)


class Model(nn.Module):
    def __init__(self, config: TextConfig, quantize: str | None):
        super().__init__()
        self.windows = config.windows
        self.embed_tokens = Embedding(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, i, quantize) for i in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)  # the first operation of the head

    def forward(self, x: Tensor, cache: KVCache, positions: Positions) -> Residual:  # (B, T, E) -> (B, T, E)
        """The hidden states before the last norm. Appends keys and values to the cache."""
        for layer in self.layers:
            x = layer(x, cache, positions)
        return x

    def next_positions(self, cache: KVCache, T: int) -> Positions:
        """The positions of the next T tokens of each row, which the cache counts as used from now on."""
        cache.advance(T)
        index = cache.length[:, None] + torch.arange(T, device=cache.length.device)
        prefix, used, on_host = cache.prefix, cache.used, not ops.triton(index)
        ranges = {window: visible(index, prefix, used, window, on_host) for window in self.windows}
        return Positions(index, cache.rotation[:, index], ranges)


class LanguageModel(nn.Module):
    """The decoder with its output head. The head is the token table, unless `head` says that the checkpoint
    has a weight for it; a quantised head is a copy of either, 8-bit even if the other matrices are 4-bit."""

    def __init__(self, config: TextConfig, quantize: str | None = None, head: bool = False):
        super().__init__()
        self.model = Model(config, quantize)
        self.softcap = config.final_logit_softcapping
        if quantize or head:
            kind = FORMATS[quantize].head if quantize else None
            self.lm_head = Linear(config.hidden_size, config.vocab_size, quantize=kind)

    @property
    def head(self) -> Embedding | Linear:
        return self.lm_head if "lm_head" in self._modules else self.model.embed_tokens

    def logits(self, x: Residual, argmax_scratch: Tensor | None = None) -> Tensor:
        """The logits of hidden states: (..., E) -> (..., V) float32. argmax_scratch: see fused.norm_head."""
        head, norm = self.head, self.model.norm
        return fused.norm_head(x, norm, head.weight, head.weight_scale, self.softcap, argmax_scratch)

    def next(self, x: Tensor, cache: KVCache, positions: Positions, argmax_scratch: Tensor) -> Tensor:
        """The logits (B, 1, V) after one more token of each row, whose embeddings are x (B, 1, E). Appends to
        the cache. Where cpu_step.py computes them, no hooks are called."""
        decoder = cpu_step.Decoder(self.model.layers, self.model.norm, self.head, self.softcap)
        logits = cpu_step.next_logits(decoder, x, cache, positions)
        return self.logits(self.model(x, cache, positions), argmax_scratch) if logits is None else logits
