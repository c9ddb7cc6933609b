"""What the reference alone promises. test_peers.py compares its numbers with Google's."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import IMAGE_TOKEN, config_dict, random_weights, write_checkpoint
from rule import given

from paligemma import PaliGemmaError, reference
from paligemma.reference.layers import attention
from paligemma.reference.model import make_attn_mask
from paligemma.reference.params import Params, round_bfloat16, round_float16

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def output_of(code: str) -> str:
    """What a new process prints for this code."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_terms_of_a_float32_product_are_added_in_order():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 3, 301)).astype(np.float32), rng.normal(size=(301, 70)).astype(np.float32)
    sums = np.zeros((2, 3, 70), np.float32)
    for k in range(301):
        sums += x[..., k, None] * w[k]
    product = Params({}, "float32").product(x, w)
    assert np.array_equal(product, sums)
    assert not np.array_equal(product, (x[..., ::-1] @ w[::-1]))  # another order is another sum


def test_the_mask_is_the_one_drawn():
    drawn = """
        x x x . . .
        x x x . . .
        x x x . . .
        x x x x . .
        x x x x x .
        . . . . . .
    """
    expected = np.array([[c == "x" for c in line.split()] for line in drawn.split("\n") if line.strip()])
    mask = make_attn_mask(np.array([[1, 1, 1, 1, 1, 0]], bool), np.array([[0, 0, 0, 1, 1, 1]]))
    assert (mask[0] == expected).all()


def test_query_heads_read_their_groups_key_head():
    """All scores are equal and each value is the number of its head: the output is the head that was read."""
    q, k = np.zeros((1, 2, 6, 4)), np.zeros((1, 2, 3, 4))
    v = np.broadcast_to(np.arange(3.0)[:, None], (1, 2, 3, 4))
    assert (attention(q, k, v, given()).reshape(1, 2, 6, 4)[0, 0, :, 0] == [0, 0, 1, 1, 2, 2]).all()


@pytest.mark.parametrize(
    ("rounded", "dtype"), [(round_bfloat16, torch.bfloat16), (round_float16, torch.float16)]
)
def test_rounding_is_torchs(rounded, dtype):
    """To nearest, ties to even: at every midpoint between neighbours, and just below it."""
    end = 0x7B00 if dtype == torch.float16 else 0x7F00
    values = torch.arange(0, end, dtype=torch.int16).view(dtype).float().numpy()
    middle = (values[:-1].astype(np.float64) + values[1:]) / 2
    below, others = np.nextafter(middle.astype(np.float32), 0), np.random.default_rng(0).standard_normal(9999)
    x = np.concatenate([values, middle, below, others]).astype(np.float32)
    x = np.concatenate([x, -x])
    assert (rounded(x) == torch.from_numpy(x).to(dtype).float().numpy()).all()
    assert np.isnan(rounded(np.float32([np.nan]))).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_dtypes_are_widened_exactly(tmp_path, tokenizer_model, dtype):
    weights = random_weights(config_dict())
    directory = write_checkpoint(tmp_path / dtype, tokenizer_model, weights=weights, dtype=dtype)
    params, vision = reference.load(directory).params, "vision_tower.vision_model"
    names = "language_model.model.embed_tokens.weight", f"{vision}.embeddings.patch_embedding.bias"
    for name in names:
        module, leaf = name.rsplit(".", 1)
        stored = weights[name].to(DTYPES[dtype]).double().numpy()
        read = (params / module)[leaf]
        assert read.dtype == np.float64
        assert (read == stored).all()
        assert (np.concatenate(list((params / module).blocks(leaf, 7))) == stored).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, "bfloat16", "float16"])
def test_results_have_the_dtype_asked_for(tiny, dtype):
    record = {}
    model = reference.load(tiny, dtype=dtype)
    ids = np.array([[IMAGE_TOKEN] * 16 + [2, 30, 4]])
    model.forward(ids, np.zeros((1, 3, 56, 56)), record=record)
    assert {x.dtype for x in record.values()} == {np.dtype(np.float64 if dtype is np.float64 else np.float32)}
    if dtype in ("bfloat16", "float16"):
        rounded = round_bfloat16 if dtype == "bfloat16" else round_float16
        assert all((rounded(x) == x).all() for x in record.values())


def test_a_recorded_result_is_not_changed_afterwards(tiny):
    given, kept = {}, {}

    class Copies(dict):  # each result as it is when it is recorded
        def __setitem__(self, name, value):
            kept[name] = value.copy()

    model = reference.load(tiny)
    inputs = np.array([[IMAGE_TOKEN] * 16 + [2, 30, 4]]), np.ones((1, 3, 56, 56))
    model.forward(*inputs, record=given)
    model.forward(*inputs, record=Copies())
    assert given.keys() == kept.keys()
    assert [name for name in given if not np.array_equal(given[name], kept[name])] == []


def test_an_unknown_dtype_is_refused(tiny):
    with pytest.raises(PaliGemmaError, match="int8"):
        reference.load(tiny, dtype=np.int8)


def test_images_and_places_must_agree(tiny):
    with pytest.raises(PaliGemmaError, match=r"hold \[15\] <image> tokens, for 1 images; each image has 16"):
        reference.load(tiny).forward(np.array([[IMAGE_TOKEN] * 15 + [2, 4]]), np.zeros((1, 3, 56, 56)))


def test_damaged_weights_are_refused(tmp_path, tokenizer_model):
    weights = random_weights(config_dict())
    weights["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    model = reference.load(write_checkpoint(tmp_path / "damaged", tokenizer_model, weights=weights))
    with pytest.raises(PaliGemmaError, match="NaN"):
        model.generate(np.array([[2, 30, 4]]), None)


@pytest.mark.parametrize(("inputs", "message"), [
    ({"input_ids": [[IMAGE_TOKEN] * 17 + [4]], "pixel_values": np.zeros((1, 3, 56, 56))}, r"hold \[17\]"),
    ({"input_ids": [[IMAGE_TOKEN] * 16 + [4]]}, "for 0 images; each image has 16"),
    ({"input_ids": [[2, -1, 4]]}, "-1"),
    ({"input_ids": [[2, 9999, 4]]}, "9999"),
    ({"input_ids": [[2, 3, 4]], "token_type_ids": [[0, 1, 0]]}, "prefix"),
    ({"input_ids": [[2, 3, 4]], "attention_mask": [[0, 0, 0]]}, "no token"),
    ({"input_ids": [[2, 3, 4]], "attention_mask": [[1, 1]]}, "all must be"),
    ({"input_ids": [[2, 3, 4]], "temperature": float("nan"), "do_sample": True}, "temperature is nan"),
    ({"input_ids": [[2, 3, 4]], "top_p": -1.0}, "top_p is -1.0"),
    ({"input_ids": [[2, 3, 4]], "max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"input_ids": [[2, 3, 4]], "max_new_tokens": 9000}, "9002 positions"),
])  # fmt: skip
def test_it_refuses_what_the_model_refuses(tiny, inputs, message):
    with pytest.raises(PaliGemmaError, match=message):
        reference.load(tiny).generate(**inputs)


def test_half_precision_tokens_follow_its_own_logits(tiny):
    """generate and forward round alike: each generated token is the best one of forward's logits."""
    model, ids = reference.load(tiny, dtype="bfloat16"), np.array([[2, 30, 41, 4]])
    tokens = model.generate(ids, max_new_tokens=12, eos_token_id=-1)
    token_type_ids = np.array([[0] * 4 + [1] * 12])
    logits = model.forward(np.concatenate([ids, tokens], axis=1), token_type_ids=token_type_ids)
    assert (logits[:, 3:-1].argmax(axis=-1) == tokens).all()


def test_it_runs_without_torch(tiny):
    code = f"""
import sys
sys.modules["torch"] = None  # an import of it fails
import numpy as np
from paligemma import reference
print(reference.load({str(tiny)!r}).forward(np.array([[2, 30, 4]]), None).shape)
"""
    assert output_of(code) == "(1, 3, 1664)\n"


def test_weights_stay_in_the_file(tmp_path, tokenizer_model):
    """100 MB of bfloat16 would be 400 MB in float64. Only one layer at a time is in memory."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64}
    config = config_dict(text=sizes)
    weights = {name: value.contiguous() for name, value in random_weights(config).items()}
    stored = {"config": config, "weights": weights, "dtype": "bfloat16"}
    directory = write_checkpoint(tmp_path / "wide", tokenizer_model, **stored)
    assert (directory / "model.safetensors").stat().st_size > 100e6
    code = f"""
import numpy as np
from paligemma import reference
reference.load({str(directory)!r}).forward(np.array([[2, 30, 4]]), None)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    peak = int(output_of(code)) / 1024
    # Python and NumPy take about 40 MB, and the widest matrix, 17 MB, is in memory a few times.
    assert peak < 150, f"{peak:.0f} MB resident"
