"""Rows that are decoded together: each gets the tokens that it gets alone, whatever the others are."""

import random

import pytest
import streams
import torch
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint

from paligemma import PaliGemmaError, cuda_graph, decode_state, load_hf_model, rows
from paligemma.decode_state import AHEAD
from paligemma.model import PaliGemma
from paligemma.options import Sampling
from paligemma.row import Row
from paligemma.rows import Rows

CUDA = torch.cuda.is_available()
if not CUDA:
    from replay import capture

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
VISION = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 1, "image_size": 28}
GEMMA = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
TEXT = {"Gemma": GEMMA, "Gemma 2": {**GEMMA_2, **GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 16}}
COUNT = 14  # inputs of a test


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer_model):
    root = tmp_path_factory.mktemp("rows")
    configs = {name: config_dict(text=text, vision=VISION) for name, text in TEXT.items()}
    return {name: write_checkpoint(root / name, tokenizer_model, config=c) for name, c in configs.items()}


@pytest.fixture
def model(directories, monkeypatch, request):
    """A model by its kind: "graphs" are those of a GPU, or simulated ones of the interpreted kernels."""
    name, kind = getattr(request, "param", "Gemma, torch").split(", ")
    monkeypatch.setattr(decode_state, "BUCKETS", (24, 48))
    device = "cuda" if CUDA and kind != "torch" else "cpu"
    if kind == "graphs" and not CUDA:
        monkeypatch.setattr(cuda_graph, "capture", capture)
        monkeypatch.setattr(PaliGemma, "uses_graphs", property(lambda self: self.graphs))
    backend = "torch" if kind == "torch" else "triton"
    loaded = load_hf_model(directories[name], dtype="float32", backend=backend, device=device)[0]
    loaded.graphs = kind == "graphs"
    return loaded


KINDS = ["Gemma, torch", "Gemma, kernels", "Gemma 2, torch", "Gemma 2, graphs"]


def inputs_of(model: PaliGemma, n: int) -> dict:
    """The n-th input: prompts of 1 to 9 tokens, pictures that differ."""
    return torch_inputs(batch(model.config, [1 + 5 * n % 9], [0], seed=n))


def options_of(n: int) -> tuple[int, Sampling]:
    """The n-th input's most new tokens and its sampling: some rows are greedy, others sample."""
    kinds = (Sampling(), Sampling(0.8, 0.9, n), Sampling(3.0, 1.0, n), Sampling(0.0, 0.5, n))
    return 1 + 3 * n % 8, kinds[n % len(kinds)]


def alone(model: PaliGemma, n: int, ends) -> tuple[list[int], list[float]]:
    """What the model answers to the n-th input by itself."""
    count, s = options_of(n)
    told: list = []
    options = {"temperature": s.temperature, "top_p": s.top_p, "seed": s.seed, "eos_token_id": ends}
    columns = model.stream(**inputs_of(model, n), max_new_tokens=count, log_probs=told, **options)
    return [int(column[0]) for column in columns], [float(value[0]) for value in told]


def answered(given: Rows, steps: int = 1000) -> list[Row]:
    """The rows in the order in which they end."""
    ended = []
    for _ in range(steps):
        if not given.busy:
            return ended
        changed = given.step()
        assert len(set(map(id, changed))) == len(changed)
        ended += [row for row in changed if row.finish_reason]
    raise AssertionError("the rows did not end")


def count_for(model: PaliGemma) -> int:
    """The number of inputs; interpreted kernels are slow."""
    return COUNT if model.backend == "torch" or CUDA else 5


def ends_of(model: PaliGemma) -> list[int]:
    """End tokens that some answers contain, so that rows stop at different places."""
    said = [token for n in range(count_for(model)) for token in alone(model, n, -1)[0][1:3]]
    return said[::6]


def check(model: PaliGemma, slots: int, numbers: list[int], ends: list[int]) -> None:
    given = Rows(model, slots)
    for n in numbers:
        count, sampling = options_of(n)
        given.submit(n, inputs_of(model, n), count, sampling, ends)
    found = answered(given)
    assert sorted(row.id for row in found) == sorted(numbers)
    for row in found:
        tokens, log_probs = alone(model, row.id, ends)
        assert row.tokens == tokens
        assert row.log_probs == pytest.approx(log_probs, abs=2e-5)
        assert row.finish_reason == ("stop" if tokens[-1] in ends else "length")
    assert given.live == [None] * slots


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_row_has_the_tokens_that_it_has_alone(model):
    ends, numbers = ends_of(model), list(range(count_for(model)))
    reasons = [alone(model, n, ends)[0][-1] in ends for n in numbers]
    assert 0 < sum(reasons) < len(numbers)
    for slots in (1, 3, COUNT + 1) if model.backend == "torch" else (3,):
        random.Random(slots).shuffle(numbers)
        check(model, slots, numbers, ends)


def test_rows_join_while_others_are_decoded(model):
    given, expected = Rows(model, 2), {n: alone(model, n, -1)[0] for n in (3, 5, 6, 10)}
    submitted = {}

    def submit(n: int) -> None:
        count, sampling = options_of(n)
        submitted[n] = given.submit(n, inputs_of(model, n), count, sampling, -1)

    submit(5)
    assert given.free == 1
    first = given.step()
    assert [row.id for row in first] == [5]
    assert submitted[5].tokens == expected[5][:2]  # the prefill gives a token, and the decode step another
    for n in (3, 6, 10):
        submit(n)
    assert given.free == 0
    given.step()
    assert submitted[5].tokens == expected[5][:3]
    assert submitted[3].tokens == expected[3][:2]
    assert submitted[6].tokens == []
    answered(given)
    assert {n: row.tokens for n, row in submitted.items()} == expected


@pytest.mark.parametrize("model", ["Gemma, torch", "Gemma, graphs"], indirect=True)
def test_a_cancelled_row_gives_its_place_away(model):
    given, expected = Rows(model, 1), alone(model, 6, -1)[0]
    endless = given.submit("endless", inputs_of(model, 5), 12, eos_token_id=-1)
    waiting = given.submit("waiting", inputs_of(model, 4), 3, eos_token_id=-1)
    last = given.submit(6, inputs_of(model, 6), *options_of(6), eos_token_id=-1)
    for _ in range(2):
        given.step()
    had = list(endless.tokens)
    given.cancel(endless)
    given.cancel(waiting)
    found = answered(given)
    assert [(row.id, row.finish_reason) for row in found] == [
        ("waiting", "cancelled"), ("endless", "cancelled"), (6, "length"),
    ]  # fmt: skip
    assert endless.tokens == had
    assert waiting.tokens == []
    assert last.tokens == expected


@pytest.mark.parametrize("model", ["Gemma, torch", "Gemma, graphs"], indirect=True)
def test_longer_rows_get_larger_caches(model):
    """The cache is replaced while rows are decoded: first one bucket is enough, then two are needed."""
    given = Rows(model, 3)
    lengths = {0: 7, 1: 12, 2: 30, 3: 5}
    submitted = [given.submit(0, inputs_of(model, 0), lengths[0], eos_token_id=-1)]
    given.step()
    small = given.state
    submitted += [given.submit(n, inputs_of(model, n), lengths[n], eos_token_id=-1) for n in (1, 2, 3)]
    answered(given)
    assert given.state is not small
    assert given.state.cache.capacity > small.cache.capacity
    for row in submitted:
        ids = model.generate(**inputs_of(model, row.id), max_new_tokens=lengths[row.id], eos_token_id=-1)
        assert row.tokens == ids[0].tolist()


@pytest.mark.parametrize("model", ["Gemma, torch", "Gemma, graphs"], indirect=True)
def test_a_damaged_picture_is_an_error_of_its_row_alone(model):
    """NaN in the picture's features reaches the logits of this row; the next row uses the same slot."""
    bad, given = inputs_of(model, 2), Rows(model, 2)
    bad["pixel_values"] = torch.full_like(bad["pixel_values"], 1e38)  # finite, but its sums are not
    for n, inputs in enumerate((inputs_of(model, 0), bad, inputs_of(model, 1), inputs_of(model, 3))):
        given.submit(n, inputs, 7, eos_token_id=-1)
    found = {row.id: row for row in answered(given)}
    assert [found[n].finish_reason for n in range(4)] == ["length", "error", "length", "length"]
    assert "overflow torch.float32" in found[1].error
    for n, number in ((0, 0), (2, 1), (3, 3)):
        ids = model.generate(**inputs_of(model, number), max_new_tokens=7, eos_token_id=-1)
        assert found[n].tokens == ids[0].tolist()


def test_only_the_rows_in_use_are_computed(model, monkeypatch):
    """On a CPU: the step of a row that is left alone has one row."""
    sizes, original = [], PaliGemma.next_logits
    monkeypatch.setattr(PaliGemma, "next_logits", lambda self, cache, x, *a: (
        sizes.append((len(x), cache.used)), original(self, cache, x, *a)
    )[1])  # fmt: skip
    given = Rows(model, 4)
    for n, count in enumerate((2, 6, 4)):
        given.submit(n, torch_inputs(batch(model.config, [3 + n], [0], seed=n)), count, eos_token_id=-1)
    answered(given)
    patches = model.config.vision_config.num_patches
    lengths = [given_[1] - patches for given_ in sizes]
    assert [size for size, _ in sizes] == [3, 2, 2, 1, 1]
    assert lengths == [6, 7, 8, 8, 9]  # the longest row in use: its prompt and its tokens so far


def test_steps_are_launched_ahead(directories, monkeypatch):
    """With streams, tokens are read late: the host launches AHEAD more steps before it waits."""
    monkeypatch.setattr(decode_state, "BUCKETS", (24, 48))
    if CUDA:
        pytest.skip("the simulation of streams is for a CPU")
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(PaliGemma, "uses_graphs", property(lambda self: self.graphs))
    model = load_hf_model(directories["Gemma 2"], dtype="float32", backend="triton", device="cpu")[0]
    ends = ends_of(model)
    numbers = list(range(9))
    expected = {n: alone(model, n, ends)[0] for n in numbers}
    model.pool.states.clear()
    streams.install(monkeypatch)
    given, most = Rows(model, 3), 0
    for n in numbers:
        given.submit(n, inputs_of(model, n), *options_of(n), ends)
    while given.busy:
        given.step()
        most = max(most, len(given.launched))
    assert most == AHEAD
    again = [given.submit(n, inputs_of(model, n), *options_of(n), ends) for n in numbers]
    answered(given)
    assert {row.id: row.tokens for row in again} == expected


@pytest.mark.parametrize("model", ["Gemma, graphs"], indirect=True)
def test_idle_slots_stay_in_the_cache(model):
    """A slot that nobody uses is computed with the others, and must not run past the end of the cache."""
    given = Rows(model, 2)
    for n in range(5):  # one at a time: the other slot is idle for more steps than the cache has places
        row = given.submit(n, inputs_of(model, n), 9, eos_token_id=-1)
        answered(given)
        ids = model.generate(**inputs_of(model, n), max_new_tokens=9, eos_token_id=-1)
        assert row.tokens == ids[0].tolist()
        assert int(given.state.cache.length[1]) <= 1


def test_wrong_arguments(model, monkeypatch):
    for slots in (0, -1, 1.5, "2", None):
        with pytest.raises(PaliGemmaError, match="slots is"):
            Rows(model, slots)
    given, inputs = Rows(model, 2), inputs_of(model, 1)
    two = torch_inputs(batch(model.config, [3, 4], [0, 0]))
    for message, args in (
        ("the input has 2 rows: submit them one by one", (two,)),
        ("max_new_tokens is 0", (inputs, 0)),
        (
            "this model has 8192: shorten the prompt, give fewer images or lower max_new_tokens",
            (inputs, 8192),
        ),
        ("eos_token_id is -2", (inputs, 5, Sampling(), -2)),
    ):
        with pytest.raises(PaliGemmaError, match=message):
            given.submit("x", *args)
    assert not given.busy
    monkeypatch.setattr(rows, "free_bytes", lambda device: 100)
    first = given.submit("x", inputs)
    assert given.step() == [first]
    assert first.finish_reason == "error"
    assert first.error.startswith("the caches of 2 rows need 0.0 GB, and 0.0 GB are free: take fewer")
    assert not given.busy


def test_a_row_without_memory_is_an_error_of_its_own(model, monkeypatch):
    given = Rows(model, 2)
    short = given.submit("short", inputs_of(model, 0), 5, eos_token_id=-1)
    given.step()
    monkeypatch.setattr(rows, "free_bytes", lambda device: 100)
    long = given.submit("long", inputs_of(model, 1), 30, eos_token_id=-1)
    answered(given)
    assert (short.finish_reason, len(short.tokens)) == ("length", 5)
    assert (long.finish_reason, long.tokens) == ("error", [])
    assert "take fewer rows" in long.error
