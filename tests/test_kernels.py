"""The kernels in Triton's interpreter, beyond what test_ops.py shows with both backends: many splits, what lies around a buffer,
and the whole model."""

import interpreter
import numpy as np
import pytest
import torch
from checkpoints import batch, config_dict, torch_inputs, write_checkpoint
from rule import DTYPES, check, given, random, tensor

from paligemma import load_hf_model, ops, reference
from paligemma.kernels.decode_attention import decode_attention, plan
from paligemma.kernels.geglu import geglu
from paligemma.kernels.prefill_attention import prefill_attention
from paligemma.kernels.rms_norm import block_of, rms_norm
from paligemma.reference import layers

interpreter.install()


def cast(x: np.ndarray, p) -> np.ndarray:
    return np.asarray(x, np.float64 if p.dtype == "float64" else np.float32)


def guarded(x: torch.Tensor, guard: int = 4096) -> torch.Tensor:
    """The same values between two bands of NaN: a read beyond the ends shows in the result."""
    buffer = torch.full((x.numel() + 2 * guard,), float("nan"), dtype=x.dtype)
    return buffer[guard : guard + x.numel()].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "K", "D"), [(8, 1, 256), (4, 2, 72)])
def test_decode_attention_merges_its_splits(dtype, H, K, D):
    """Row lengths that end in the first split, at a boundary and in the last; behind them the cache holds NaN."""
    lengths, S = [1, 32, 33, 640, 700], 700
    splits, per_split = plan(len(lengths) * K, S)
    assert splits > 4
    assert splits * per_split >= S
    q, k, v = random(0, 5, 1, H, D, dtype=dtype), random(1, 5, S, K, D, dtype=dtype), random(2, 5, S, K, D, dtype=dtype)
    keys, values = tensor(k, dtype), tensor(v, dtype)
    for row, length in enumerate(lengths):
        keys[row, length:] = values[row, length:] = float("nan")
    value = decode_attention(guarded(tensor(q, dtype)), guarded(keys), guarded(values), torch.tensor(lengths)[:, None])
    mask = np.arange(S) < np.array(lengths)[:, None, None]
    plain = ops.attention(*(tensor(x, dtype) for x in (q, k, v)), torch.from_numpy(mask))
    check(value, lambda p: p.emit(layers.attention(cast(q, p), cast(k, p), cast(v, p), mask)), given(), dtype, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_reads_nothing_beyond_the_limits(dtype):
    lengths, S, (H, K, D) = [3, 65, 130], 130, (4, 2, 24)
    q, k, v = random(0, 3, S, H, D, dtype=dtype), random(1, 3, S, K, D, dtype=dtype), random(2, 3, S, K, D, dtype=dtype)
    keys, values = tensor(k, dtype), tensor(v, dtype)
    for row, length in enumerate(lengths):
        keys[row, length:] = values[row, length:] = float("nan")
    limit = torch.tensor(lengths)[:, None].expand(3, S).contiguous()
    value = prefill_attention(guarded(tensor(q, dtype)), guarded(keys), guarded(values), limit)
    mask = np.arange(S) < limit.numpy()[:, :, None]
    check(value, lambda p: p.emit(layers.attention(cast(q, p), cast(k, p), cast(v, p), mask)), given(), dtype)


@pytest.mark.parametrize("size", [1, 33, 2047, 2049])
def test_elementwise_kernels_stay_in_their_buffers(size):
    gate, up = (guarded(torch.randn(3, size)) for _ in range(2))
    assert geglu(gate, up).isfinite().all()
    assert rms_norm(gate, guarded(torch.randn(size)), 1e-6).isfinite().all()


def test_rows_are_cut_into_blocks_that_divide_them():
    assert {E: block_of(E) for E in (2048, 2304, 3584, 4608, 1152, 72, 33)} == {
        2048: 2048, 2304: 256, 3584: 512, 4608: 512, 1152: 2048, 72: 128, 33: 64
    }  # fmt: skip


@pytest.mark.parametrize("heads", [{}, {"num_key_value_heads": 2, "head_dim": 20}], ids=["multi-query", "grouped"])
def test_the_whole_model_says_what_the_reference_says(tmp_path, tokenizer_model, heads):
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config_dict(text=heads))
    model, _ = load_hf_model(directory, dtype="float32", backend="triton")
    inputs = batch(model.config, [2, 8], [3, 0])
    valid = inputs["attention_mask"].astype(bool)
    truth = reference.load(directory)
    logits = model(**torch_inputs(inputs)).numpy()
    assert np.abs(logits - truth.forward(**inputs))[valid].max() < 5e-5  # float32 rounding at logits of RMS 1
    expected = truth.generate(**inputs, max_new_tokens=6, eos_token_id=-1)
    assert (model.generate(**torch_inputs(inputs), max_new_tokens=6, eos_token_id=-1).numpy() == expected).all()
