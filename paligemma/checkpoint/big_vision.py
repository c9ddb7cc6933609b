"""The parameters as big_vision, Google's training code, names and stacks them. No torch, no NumPy."""

from ..config import PaliGemmaConfig
from .stored import EMBEDDING

KERNEL, BIAS, SCALE = "/kernel", "/bias", "/scale"
TABLE = "llm/embedder/input_embedding"
FUSED = "llm/layers/attn/qkv_einsum/w"  # q, k and v in one array, if each query head has its own keys
VISION_BLOCK = "img/Transformer/encoderblock"
VISION_ATTENTION = f"{VISION_BLOCK}/MultiHeadDotProductAttention_0"

Axes = tuple[int, ...]
# A parameter in an array: its canonical name, the leading indices that select it, and the permutation of the
# remaining axes that gives the parameter's own order; None if the order is the same.
Place = tuple[str, Axes, Axes | None]


def tree(config: PaliGemmaConfig, fused: bool) -> dict[str, tuple[Axes, list[Place]]]:
    """The shape of each array and the parameters in it. fused: whether q, k and v are one array."""
    v, t = config.vision_config, config.text_config
    W, heads, d, patch = v.hidden_size, v.num_attention_heads, v.head_dim, v.patch_size
    E, H, K, D = t.hidden_size, t.num_attention_heads, t.num_key_value_heads, t.head_dim
    arrays: dict[str, tuple[Axes, list[Place]]] = {}

    def one(name: str, shape: Axes, ours: str, order: Axes | None = None) -> None:
        """An array that is one parameter."""
        arrays[name] = shape, [(ours, (), order)]

    def vision(name: str, shape: Axes, ours: str, order: Axes | None = None) -> None:
        """An array of SigLIP's layers, (L, *shape), with one parameter of each."""
        layers, prefix = range(v.num_hidden_layers), "vision_tower.vision_model.encoder.layers"
        arrays[f"{VISION_BLOCK}/{name}"] = (
            (len(layers), *shape), [(f"{prefix}.{i}.{ours}", (i,), order) for i in layers]
        )  # fmt: skip

    def text(name: str, shape: Axes, *ours: str, order: Axes | None = None) -> None:
        """An array of Gemma's layers, (L, *shape) or, with several parameters of each, (L, n, *shape)."""
        layers, prefix = range(t.num_hidden_layers), "language_model.model.layers"
        if len(ours) == 1:
            parts, stack = [(ours[0], ())], ()
        else:
            parts, stack = [(part, (j,)) for j, part in enumerate(ours)], (len(ours),)
        places = [(f"{prefix}.{i}.{part}", (i, *index), order) for i in layers for part, index in parts]
        arrays[f"llm/layers/{name}"] = (len(layers), *stack, *shape), places

    model = "vision_tower.vision_model"
    patches = f"{model}.embeddings.patch_embedding"
    one("img/embedding" + KERNEL, (patch, patch, 3, W), f"{patches}.weight", (3, 2, 0, 1))
    one("img/embedding" + BIAS, (W,), f"{patches}.bias")
    one("img/pos_embedding", (1, v.num_patches, W), f"{model}.embeddings.position_embedding.weight")
    for i in range(2):
        for leaf, ours in ((SCALE, "weight"), (BIAS, "bias")):
            vision(f"LayerNorm_{i}{leaf}", (W,), f"layer_norm{i + 1}.{ours}")
    attention = VISION_ATTENTION.removeprefix(f"{VISION_BLOCK}/")
    for name in ("query", "key", "value"):
        ours = f"self_attn.{name[0]}_proj"
        vision(f"{attention}/{name}{KERNEL}", (W, heads, d), f"{ours}.weight", (1, 2, 0))
        vision(f"{attention}/{name}{BIAS}", (heads, d), f"{ours}.bias")
    vision(f"{attention}/out{KERNEL}", (heads, d, W), "self_attn.out_proj.weight", (2, 0, 1))
    vision(f"{attention}/out{BIAS}", (W,), "self_attn.out_proj.bias")
    M = v.intermediate_size
    for i, (wide, out) in enumerate(((W, M), (M, W))):
        vision(f"MlpBlock_0/Dense_{i}{KERNEL}", (wide, out), f"mlp.fc{i + 1}.weight", (1, 0))
        vision(f"MlpBlock_0/Dense_{i}{BIAS}", (out,), f"mlp.fc{i + 1}.bias")
    for leaf, ours in ((SCALE, "weight"), (BIAS, "bias")):
        one(f"img/Transformer/encoder_norm{leaf}", (W,), f"{model}.post_layernorm.{ours}")
    one("img/head" + KERNEL, (W, E), "multi_modal_projector.linear.weight", (1, 0))
    one("img/head" + BIAS, (E,), "multi_modal_projector.linear.bias")

    one(TABLE, (t.vocab_size, E), EMBEDDING)
    q, k, v_ = (f"self_attn.{name}_proj.weight" for name in "qkv")
    transposed = (0, 2, 1)  # (heads, E, D) -> (heads, D, E)
    if fused:
        text("attn/qkv_einsum/w", (H, E, D), q, k, v_, order=transposed)
    else:
        text("attn/q_einsum/w", (H, E, D), q, order=transposed)
        text("attn/kv_einsum/w", (K, E, D), k, v_, order=transposed)
    text("attn/attn_vec_einsum/w", (H, D, E), "self_attn.o_proj.weight", order=(2, 0, 1))
    M = t.intermediate_size
    text("mlp/gating_einsum", (E, M), "mlp.gate_proj.weight", "mlp.up_proj.weight", order=(1, 0))
    text("mlp/linear", (M, E), "mlp.down_proj.weight", order=(1, 0))
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if t.post_norms:  # Gemma 2 uses the name post_attention_layernorm for another norm
        norms |= {"post_attention_norm": "post_attention_layernorm"}
        norms |= {"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    for theirs, ours in norms.items():
        text(f"{theirs}{SCALE}", (E,), f"{ours}.weight")
    one("llm/final_norm" + SCALE, (E,), "language_model.model.norm.weight")
    return arrays
