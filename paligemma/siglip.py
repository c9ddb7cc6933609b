"""SigLIP's vision transformer. Read it beside reference/siglip.py. Module names are the checkpoint's."""

from torch import Tensor, nn

from . import fused, ops
from .config import VisionConfig
from .fused import Residual
from .layers import LayerNorm, Linear, parameter


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = PositionEmbedding(config)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, S, S) -> (B, P, W)
        return self.patch_embedding(pixel_values) + self.position_embedding.weight


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, computed as one product for each patch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = parameter(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        self.bias = parameter(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, S, S) -> (B, P, W)
        B, C, size, _ = pixel_values.shape
        patch = self.weight.shape[-1]
        n = size // patch
        pixels = pixel_values[:, :, : n * patch, : n * patch].reshape(B, C, n, patch, n, patch)
        # Patches are in reading order; their features are ordered (c, y, x).
        patches = pixels.permute(0, 2, 4, 1, 3, 5).reshape(B, n * n, C * patch * patch)
        return ops.linear(patches, self.weight.flatten(1), self.bias)


class PositionEmbedding(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = parameter(config.num_patches, config.hidden_size)


class SelfAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = (config.num_attention_heads, config.head_dim)
        W = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(W, W, bias=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, P, W) -> (B, P, W)
        projected = fused.linears(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, self.heads) for y in projected)
        return self.out_proj(ops.attention(q, k, v))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(fused.project_gelu(x, self.fc1))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Residual) -> Residual:  # (B, P, W) -> (B, P, W)
        normed, x = fused.norm_residual(x, self.layer_norm1)
        x = fused.add(x, self.self_attn(normed))
        normed, x = fused.norm_residual(x, self.layer_norm2)
        return fused.add(x, self.mlp(normed))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Residual:
        for layer in self.layers:
            x = layer(x)
        return x


class VisionModel(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:  # (B, C, S, S) -> (B, P, W)
        normed, _ = fused.norm_residual(self.encoder(self.embeddings(pixel_values)), self.post_layernorm)
        return normed


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vision_model = VisionModel(config)
