"""Google's .npz files: the published tree, which is read in place, and files that are refused."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, random_weights, torch_inputs, write_checkpoint
from command_line import assert_one_line, run

from paligemma import PaliGemmaError, load_hf_model, reference
from paligemma.checkpoint import npz
from paligemma.config import PaliGemmaConfig

BLOCK = "img/Transformer/encoderblock"


def tree(config: dict, weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The parameters as big_vision names and stacks them, according to the listing of a published file."""
    c = PaliGemmaConfig.from_dict(config)
    v, t = c.vision_config, c.text_config
    prefixes = r"^(vision_tower\.vision_model\.|language_model\.model\.)"
    w = {re.sub(prefixes, "", name): x.numpy() for name, x in weights.items()}
    W, h, d = v.hidden_size, v.num_attention_heads, v.head_dim
    E, H, K, D = t.hidden_size, t.num_attention_heads, t.num_key_value_heads, t.head_dim

    def vision(name: str, make=lambda x: x) -> np.ndarray:
        return np.stack([make(w[f"encoder.layers.{i}.{name}"]) for i in range(v.num_hidden_layers)])

    def text(name: str, make=lambda x: x) -> np.ndarray:
        return np.stack([make(w[f"layers.{i}.{name}"]) for i in range(t.num_hidden_layers)])

    arrays = {
        "img/embedding/kernel": w["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
        "img/embedding/bias": w["embeddings.patch_embedding.bias"],
        "img/pos_embedding": w["embeddings.position_embedding.weight"][None],
        "img/Transformer/encoder_norm/scale": w["post_layernorm.weight"],
        "img/Transformer/encoder_norm/bias": w["post_layernorm.bias"],
        "img/head/kernel": w["multi_modal_projector.linear.weight"].T,
        "img/head/bias": w["multi_modal_projector.linear.bias"],
        f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel": vision(
            "self_attn.out_proj.weight", lambda x: x.T.reshape(h, d, W)
        ),
        f"{BLOCK}/MultiHeadDotProductAttention_0/out/bias": vision("self_attn.out_proj.bias"),
        "llm/embedder/input_embedding": w["embed_tokens.weight"][: config["image_token_index"]],
        "llm/final_norm/scale": w["norm.weight"],
        "llm/layers/attn/attn_vec_einsum/w": text("self_attn.o_proj.weight", lambda x: x.T.reshape(H, D, E)),
        "llm/layers/mlp/gating_einsum": np.stack(
            [text(f"mlp.{name}_proj.weight", np.transpose) for name in ("gate", "up")], axis=1
        ),
        "llm/layers/mlp/linear": text("mlp.down_proj.weight", np.transpose),
        "llm/layers/pre_attention_norm/scale": text("input_layernorm.weight"),
    }
    for i in range(2):
        arrays[f"{BLOCK}/LayerNorm_{i}/scale"] = vision(f"layer_norm{i + 1}.weight")
        arrays[f"{BLOCK}/LayerNorm_{i}/bias"] = vision(f"layer_norm{i + 1}.bias")
        arrays[f"{BLOCK}/MlpBlock_0/Dense_{i}/kernel"] = vision(f"mlp.fc{i + 1}.weight", np.transpose)
        arrays[f"{BLOCK}/MlpBlock_0/Dense_{i}/bias"] = vision(f"mlp.fc{i + 1}.bias")
    for name in ("query", "key", "value"):
        at = f"{BLOCK}/MultiHeadDotProductAttention_0/{name}"
        arrays[f"{at}/kernel"] = vision(f"self_attn.{name[0]}_proj.weight", lambda x: x.T.reshape(W, h, d))
        arrays[f"{at}/bias"] = vision(f"self_attn.{name[0]}_proj.bias", lambda x: x.reshape(h, d))

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, D, E).transpose(0, 2, 1)

    q, k, v_ = (text(f"self_attn.{name}_proj.weight", heads) for name in "qkv")
    if K == H:
        arrays["llm/layers/attn/qkv_einsum/w"] = np.stack([q, k, v_], axis=1)
    else:
        arrays |= {"llm/layers/attn/q_einsum/w": q, "llm/layers/attn/kv_einsum/w": np.stack([k, v_], axis=1)}
    if t.post_norms:
        norms = {
            "post_attention": "post_attention",
            "pre_ffw": "pre_feedforward",
            "post_ffw": "post_feedforward",
        }
    else:
        norms = {"pre_ffw": "post_attention"}
    for theirs, ours in norms.items():
        arrays[f"llm/layers/{theirs}_norm/scale"] = text(f"{ours}_layernorm.weight")
    return {f"params/{name}": np.ascontiguousarray(x) for name, x in arrays.items()}


def as_stored(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # NumPy does not know JAX's bfloat16 and writes it as V2
        return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view("V2")
    return x.astype(dtype)


# Their scale, softcaps and window are those that are used for a file without a config.json.
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
FAMILIES = {
    "PaliGemma 1": {},
    "keys for each head": {"num_key_value_heads": 4},
    "PaliGemma 2": {**GEMMA_2, **CAPS, "query_pre_attn_scalar": 24},
    "PaliGemma 2 28B": {**GEMMA_2, **CAPS, "hidden_size": 72, "head_dim": 128, "query_pre_attn_scalar": 18},
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_same_weights_in_safetensors(tmp_path, tokenizer_model, family, dtype):
    config = config_dict(text=FAMILIES[family])
    weights, directory = random_weights(config), tmp_path / "published"
    write_checkpoint(directory, tokenizer_model, config=config, weights=weights, dtype=dtype)
    file = tmp_path / "jax" / "paligemma.npz"
    file.parent.mkdir()
    np.savez(file, **{name: as_stored(x, dtype) for name, x in tree(config, weights).items()})
    inputs = batch(PaliGemmaConfig.load(directory), [3, 9], [4, 0])
    valid = inputs["attention_mask"].astype(bool)
    for into in {"float32", dtype} - {"float64"}:
        theirs, their_processor = load_hf_model(directory, device="cpu", dtype=into)
        model_file = directory / "tokenizer.model"
        ours, processor = load_hf_model(file, tokenizer=model_file, device="cpu", dtype=into)
        assert processor.tokenizer.encode("cat") == their_processor.tokenizer.encode("cat")
        assert torch.equal(ours(**torch_inputs(inputs)), theirs(**torch_inputs(inputs))[..., :1600])
    given, expected = (reference.load(x).forward(**inputs)[valid][:, :1600] for x in (file, directory))
    np.testing.assert_allclose(given, expected, atol=1e-11)  # float64: the same sums in another order


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    config = config_dict()
    return tree(config, random_weights(config))


def save(file, arrays: dict[str, np.ndarray]):
    np.savez(file, **arrays)
    return file


def test_the_command_line_answers_from_it(tmp_path, arrays, tokenizer_model, image_file):
    file = save(tmp_path / "x.npz", arrays)
    line = ["--model", file, "--image", image_file, "--prompt", "caption en", "--no-sample"]
    line += ["--max-new-tokens", "3"]
    lacks = f"{tmp_path} has no tokenizer.model and no tokenizer.json: give one with --tokenizer"
    assert_one_line(run(*line), lacks)
    (tmp_path / "other.model").write_bytes(tokenizer_model)
    answer = run(*line, "--tokenizer", tmp_path / "other.model")
    assert answer.text == run(*line, "--tokenizer", tmp_path / "other.model", "--backend", "reference").text
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    assert run(*line).text == answer.text


def edited(arrays: dict, **changes) -> dict:
    """The arrays, with some replaced, chosen by the ends of their names; None removes one."""
    result = dict(arrays)
    for end, value in changes.items():
        name = next((name for name in arrays if name.endswith(end)), end)
        result[name] = value
    return {name: value for name, value in result.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_norm/scale": None}, "1 missing (llm/final_norm/scale)"),
        ({"params/llm/layers/attn/q_norm": np.zeros(3, np.float32)}, "1 unexpected (llm/layers/attn/q_norm)"),
        ({"img/embedding/kernel": None},
         "params/img/embedding/kernel is missing: this is not a PaliGemma as big_vision saves it"),
        ({"img/pos_embedding": np.zeros((1, 17, 72), np.float32)}, "17 patches"),
        ({"mlp/linear": np.zeros((3, 152, 89), np.float32)},
         "params/llm/layers/mlp/linear has shape (3, 152, 89); the rest of the file asks for (3, 152, 88)"),
        ({"encoder_norm/bias": np.zeros(72, np.int32)},
         "encoder_norm/bias.npy is int32; only float64, float32, float16 and bfloat16 are supported"),
        ({"encoder_norm/bias": np.array([{}] * 72, object)},
         "encoder_norm/bias.npy holds Python objects, which are pickled and never opened"),
        ({"mlp/linear": np.asfortranarray(np.zeros((3, 152, 88), np.float32))}, "is stored column by column"),
    ],
)  # fmt: skip
def test_another_tree_is_refused_by_name(tmp_path, arrays, changes, message):
    file = save(tmp_path / "x.npz", edited(arrays, **changes))
    for load in (load_hf_model, reference.load):
        with pytest.raises(PaliGemmaError) as caught:
            load(file)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_beside_it_must_fit(tmp_path, arrays):
    keys_for_each_head = config_dict(text={"num_key_value_heads": 4})
    fused = tree(keys_for_each_head, random_weights(keys_for_each_head))
    for config, given, message in (
        (config_dict(text={"num_hidden_layers": 10**9}), arrays,
         "pre_attention_norm/scale has shape (3, 88); config.json asks for 1000000000 layers"),
        (config_dict(text={"intermediate_size": 150}), arrays,
         "gating_einsum has shape (3, 2, 88, 152); config.json asks for (3, 2, 88, 150)"),
        (config_dict(tie_word_embeddings=False), arrays,
         "tie_word_embeddings is False, but the output head of an .npz file is its embedding"),
        (config_dict(), fused,
         "has keys for each query head; config.json asks for 4 query heads to 1 key heads"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(PaliGemmaError) as caught:
            npz.load(save(tmp_path / "x.npz", given))
        assert message in str(caught.value)


def member(name: str, x: np.ndarray) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return name, buffer.getvalue()


def test_files_that_are_not_whole_are_refused(tmp_path, arrays):
    whole = save(tmp_path / "x.npz", arrays).read_bytes()
    name, content = member("params/img/embedding/bias.npy", np.zeros(72, np.float32))

    def archive(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", compression) as file:
            for named, data in members:
                file.writestr(named, data)
        return buffer.getvalue()

    compressed = archive((name, content), compression=zipfile.ZIP_DEFLATED)
    damaged = {
        whole[: len(whole) // 2]: "is not a whole .npz file",
        b"": "is not a whole .npz file",
        b"PK" + bytes(100): "is not a whole .npz file",
        compressed: "is compressed, so it cannot be read in place: save it again with numpy.savez",
        archive((name, content[:-8])): "which does not match its shape (72,)",
        archive((name, content + bytes(8))): "which does not match its shape (72,)",
        archive((name, b"hello")): "is not an array that NumPy wrote",
        archive((name, content.replace(b"(72,)", b"(7_,)"))): "is not an array that NumPy wrote",
        archive((name, content.replace(b"(72,)", b"(-2,)"))): "which does not match its shape (-2,)",
        archive((name, content), ("img/embedding/bias.npy", content)): "twice",
    }
    for data, message in damaged.items():
        (tmp_path / "x.npz").write_bytes(data)
        with pytest.raises(PaliGemmaError) as caught:
            npz.load(tmp_path / "x.npz")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
