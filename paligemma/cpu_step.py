"""A decode step on a CPU: one token of each row through all layers of the decoder and its head, as calls of
Numba kernels. The calls are listed once for a cache and run for every token, as a GPU replays a graph."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import cpu_linear, ops, torch_ops
from .attention_range import Positions
from .kv_cache import KVCache
from .layers import Linear, RMSNorm


class Decoder(NamedTuple):
    """What a step computes."""

    layers: nn.ModuleList  # each a gemma.DecoderLayer
    norm: RMSNorm
    head: nn.Module  # with `features`, a weight (V, E), and a weight_scale, which is None if it is not 8-bit
    softcap: float | None  # of the logits


def next_logits(decoder: Decoder, x: Tensor, cache: KVCache, positions: Positions) -> Tensor | None:
    """The logits (B, 1, V) float32 after one more token of each row; x (B, 1, E) are the embeddings. Appends
    to the cache. None if the kernels do not compute on these."""
    if not ops.numba(x) or torch.is_grad_enabled() or not 0 < len(x) <= cpu_linear.NUMBA_ROWS:
        return None
    if x.shape[1] != 1 or not cpu_linear.kernels_run():
        return None
    from .kernels.cpu_workers import own_threads

    with own_threads() as threads:
        key = (len(x), threads)
        step = cache.steps.get(key)
        if key not in cache.steps or (step and not step.reads(decoder)):
            # The calls of a step listed in inference mode could not be run outside of it.
            with torch.inference_mode(False), torch.no_grad():
                listed = decodes(decoder, cache, x.dtype)
                step = cache.steps[key] = CpuStep(decoder, cache, *key) if listed else None
        if not step:
            return None
        logits = step.run(x, positions)
    return logits if decoder.softcap is None else torch_ops.softcap_(logits, decoder.softcap)


def decodes(decoder: Decoder, cache: KVCache, dtype: torch.dtype) -> bool:
    """Whether the kernels compute on all of this decoder and this cache, and are the fastest."""
    from .kernels.cpu_decode import takes

    modules = [*decoder.layers.modules(), decoder.norm]
    norms = [module.weight for module in modules if isinstance(module, RMSNorm)]
    linears = [module for module in modules if isinstance(module, Linear)]
    products: list[Any] = [*linears, decoder.head]
    for product in products:
        weight, features = product.weight, product.features
        if features * len(weight) < cpu_linear.LARGE or not takes(weight.dtype, features):
            return False
    scales = [product.weight_scale for product in products if product.weight_scale is not None]
    read = (*norms, *scales, cache.keys_values)
    whole = all(y.is_contiguous() for y in (*norms, *scales, *(product.weight for product in products)))
    same = dtype == torch.bfloat16 and all(y.dtype == dtype for y in read)
    return whole and same and all(linear.bias is None for linear in linears)


class CpuStep:
    """The calls for some rows, on some threads."""

    def __init__(self, decoder: Decoder, cache: KVCache, rows: int, threads: int):
        from .kernels.cpu_decode import Calls

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cpu")

        self.calls, self.capacity, self.decoder = Calls(rows, threads), cache.capacity, decoder
        self.addresses = [
            (module._parameters, name, _address(parameter))
            for module in (*decoder.layers.modules(), decoder.norm, decoder.head)
            for name, parameter in module._parameters.items()
        ]  # fmt: skip
        layers: list[Any] = list(decoder.layers)
        head: Any = decoder.head
        self.x = zeros(rows, head.features, dtype=cache.keys_values.dtype)
        self.rotation = zeros(2, rows, cache.rotation.shape[2], dtype=torch.float32)
        self.position = zeros(rows)
        # For each window, the positions that each row attends to.
        self.ranges = {layer.self_attn.window: (zeros(rows), zeros(rows)) for layer in layers}
        x, calls = self.x, self.calls
        for layer in layers:  # as gemma.DecoderLayer.forward
            attn, mlp = layer.self_attn, layer.mlp
            before_attn, after_attn, before_mlp, after_mlp = (
                norm and (norm.weight, norm.eps) for norm in layer.norms
            )
            keys, values = cache.keys_values[layer.layer, :, :rows]  # (R, S, K, D)
            projections, places = [linear.stored for linear in attn.qkv], (self.rotation, self.position)
            q = calls.norm_qkv_rope(x, before_attn, projections, *places, keys, values)
            visible = self.ranges[attn.window]
            attended = calls.attention(q, keys, values, *visible, attn.scale, attn.softcap)
            x = calls.project_add(attended, attn.o_proj.stored, x, after_attn)
            hidden = calls.norm_geglu(x, before_mlp, mlp.gate_proj.stored, mlp.up_proj.stored)
            x = calls.project_add(hidden, mlp.down_proj.stored, x, after_mlp)
        stored = head.weight, head.weight_scale
        self.logits = calls.norm_head(x, (decoder.norm.weight, decoder.norm.eps), stored)

    def reads(self, decoder: Decoder) -> bool:
        """Whether this is its decoder, with all parameters where they were when the calls were listed."""
        same = all(_address(y.get(name)) == address for y, name, address in self.addresses)
        return same and all(one is other for one, other in zip(decoder[:3], self.decoder[:3], strict=True))

    def run(self, x: Tensor, positions: Positions) -> Tensor:  # (B, 1, E) -> (B, 1, V), before the softcap
        last = int(positions.indices.max())
        if last >= self.capacity:
            raise IndexError(f"position {last} is not one of the {self.capacity} of the cache")
        self.x.copy_(x[:, 0])
        self.rotation.copy_(positions.rotation[:, :, 0])
        self.position.copy_(positions.indices[:, 0])
        for window, (start, limit) in self.ranges.items():
            visible = positions.visible[window]
            limit.copy_(visible.limit[:, 0]).clamp_(max=self.capacity)
            start.zero_() if visible.start is None else start.copy_(visible.start[:, 0])
        self.calls.run()
        return self.logits.clone()[:, None]


def _address(parameter: Tensor | None) -> int | None:
    return None if parameter is None else parameter.data_ptr()
