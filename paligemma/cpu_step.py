"""A decode step on a CPU: one token of each row through all layers of the decoder, as calls of Numba kernels.
The calls are listed once for a cache, and run for every token, as a GPU replays a CUDA graph."""

from typing import Any

import torch
from torch import Tensor, nn

from . import cpu_linear, ops
from .attention_range import Positions
from .kv_cache import KVCache
from .layers import Linear, RMSNorm


def next_hidden(layers: nn.ModuleList, x: Tensor, cache: KVCache, positions: Positions) -> Tensor | None:
    """The hidden states (B, 1, E) after the layers, each a gemma.DecoderLayer, of one more token of each row;
    x (B, 1, E) are the embeddings. Appends to the cache. None if the kernels do not compute on these."""
    if not ops.numba(x) or torch.is_grad_enabled() or not 0 < len(x) <= cpu_linear.NUMBA_ROWS:
        return None
    if x.shape[1] != 1 or not cpu_linear.kernels_run():
        return None
    from .kernels.cpu_workers import own_threads

    with own_threads() as threads:
        key = (len(x), threads)
        step = cache.steps.get(key)
        if key not in cache.steps or (step and not step.reads(layers)):
            # The calls of a step listed in inference mode could not be run outside of it.
            with torch.inference_mode(False), torch.no_grad():
                listed = decodes(layers, cache, x.dtype)
                step = cache.steps[key] = CpuStep(layers, cache, *key) if listed else None
        return step.run(x, positions) if step else None


def decodes(layers: nn.ModuleList, cache: KVCache, dtype: torch.dtype) -> bool:
    """Whether the kernels compute on all of these layers and this cache, and are the fastest."""
    from .kernels.cpu_decode import takes

    modules = list(layers.modules())
    linears = [module for module in modules if isinstance(module, Linear)]
    norms = [module.weight for module in modules if isinstance(module, RMSNorm)]
    scales = [linear.weight_scale for linear in linears if linear.weight_scale is not None]
    for linear in linears:
        weight, outputs, features = linear.weight, len(linear.weight), linear.features
        large = features * outputs >= cpu_linear.LARGE
        if linear.bias is not None or not large or not takes(weight.dtype, features, outputs):
            return False
    read = (*norms, *scales, cache.keys_values)
    whole = all(y.is_contiguous() for y in (*norms, *scales, *(linear.weight for linear in linears)))
    return whole and dtype == torch.bfloat16 and all(y.dtype == dtype for y in read)


class CpuStep:
    """The calls for some rows, on some threads."""

    def __init__(self, layers: nn.ModuleList, cache: KVCache, rows: int, threads: int):
        from .kernels.cpu_decode import Calls

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device="cpu")

        self.calls, self.capacity, self.layers = Calls(rows, threads), cache.capacity, layers
        self.addresses = [
            (module._parameters, name, _address(parameter))
            for module in layers.modules() for name, parameter in module._parameters.items()
        ]  # fmt: skip
        decoder: list[Any] = list(layers)
        self.x = zeros(rows, decoder[0].mlp.gate_proj.features, dtype=cache.keys_values.dtype)
        self.rotation = zeros(2, rows, cache.rotation.shape[2], dtype=torch.float32)
        self.position = zeros(rows)
        # For each window, the positions that each row attends to.
        self.ranges = {layer.self_attn.window: (zeros(rows), zeros(rows)) for layer in decoder}
        x, calls = self.x, self.calls
        for layer in decoder:  # as gemma.DecoderLayer.forward
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
        self.out = x

    def reads(self, layers: nn.ModuleList) -> bool:
        """Whether these are its layers, with all parameters where they were when the calls were listed."""
        same = all(_address(y.get(name)) == address for y, name, address in self.addresses)
        return layers is self.layers and same

    def run(self, x: Tensor, positions: Positions) -> Tensor:  # (B, 1, E) -> (B, 1, E)
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
        return self.out.clone()[:, None]


def _address(parameter: Tensor | None) -> int | None:
    return None if parameter is None else parameter.data_ptr()
