"""SigLIP's vision transformer: Zhai et al. 2023, arXiv:2303.15343; PaliGemma has So400m. (B, 3, S, S) -> (B,
P, W)."""

from ..config import VisionConfig
from .layers import attention, gelu_tanh, layer_norm, linear
from .params import Array, Params


def embeddings(pixel_values: Array, p: Params, config: VisionConfig) -> Array:  # (B, C, S, S) -> (B, P, W)
    B, C, size, _ = pixel_values.shape
    n, patch = size // config.patch_size, config.patch_size
    pixels = pixel_values[:, :, : n * patch, : n * patch].reshape(B, C, n, patch, n, patch)
    # Patches are in reading order; their features are ordered (c, y, x).
    patches = pixels.transpose(0, 2, 4, 1, 3, 5).reshape(B, n * n, C * patch * patch)
    conv = p / "patch_embedding"
    weight = conv["weight"].reshape(config.hidden_size, -1)
    x = conv.emit(conv.product(patches, weight.T) + conv["bias"])
    return p.emit(x + (p / "position_embedding")["weight"])


def self_attn(x: Array, p: Params, config: VisionConfig) -> Array:
    B, P, _ = x.shape
    heads = (B, P, config.num_attention_heads, config.head_dim)
    q, k, v = (linear(x, p / f"{name}_proj").reshape(heads) for name in "qkv")
    context = (p / "out_proj").emit(attention(q, k, v, p), ".input")
    return linear(context, p / "out_proj")


def mlp(x: Array, p: Params) -> Array:
    hidden = (p / "fc2").emit(gelu_tanh(linear(x, p / "fc1")), ".input")
    return linear(hidden, p / "fc2")


def encoder_layer(x: Array, p: Params, config: VisionConfig) -> Array:
    eps = config.layer_norm_eps
    attended = self_attn(layer_norm(x, p / "layer_norm1", eps), p / "self_attn", config)
    x = (p / "layer_norm2").emit(x + attended, ".input")
    return p.emit(x + mlp(layer_norm(x, p / "layer_norm2", eps), p / "mlp"))


def vision_model(pixel_values: Array, p: Params, config: VisionConfig) -> Array:
    x = embeddings(pixel_values, p / "embeddings", config)
    for i in range(config.num_hidden_layers):
        x = encoder_layer(x, p / "encoder" / "layers" / i, config)
    return layer_norm(x, p / "post_layernorm", config.layer_norm_eps)
