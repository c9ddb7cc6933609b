"""Recorded steps: a replay computes what launched kernels compute, for any prompt, image and length."""

import copy
import gc
import weakref

import pytest
import streams
import torch
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint

if not torch.cuda.is_available():
    from replay import capture

from paligemma import PaliGemmaError, cuda_graph, decode_state, load_hf_model
from paligemma.decode_state import DecodeState, bucket
from paligemma.model import PaliGemma

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("error:no CUDA graph")  # the answers would be the same without one
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
VISION = {**SMALL, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 1, "image_size": 28}
GEMMA = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}
TEXT = {"Gemma": GEMMA, "Gemma 2": {**GEMMA_2, **GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 16}}


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer_model):
    root = tmp_path_factory.mktemp("recorded")
    configs = {name: config_dict(text=text, vision=VISION) for name, text in TEXT.items()}
    return {name: write_checkpoint(root / name, tokenizer_model, config=c) for name, c in configs.items()}


@pytest.fixture
def model(directories, monkeypatch, request):
    """On a GPU with its graphs; on a CPU with simulated graphs of the kernels in Triton's interpreter."""
    monkeypatch.setattr(decode_state, "BUCKETS", (24, 48))
    directory = directories[getattr(request, "param", "Gemma")]
    if not CUDA:
        monkeypatch.setattr(cuda_graph, "capture", capture)
        monkeypatch.setattr(PaliGemma, "uses_graphs", property(lambda self: self.graphs))
    return load_hf_model(directory, dtype="float32", backend="triton", device="cuda" if CUDA else "cpu")[0]


def answers(model: PaliGemma, prompts: list, **options) -> list[tuple[list, list]]:
    """Tokens and log-probabilities of one call after another."""
    results, options = [], {"max_new_tokens": 5, "eos_token_id": -1, **options}
    for seed, (text, suffix) in enumerate(prompts):
        log_probs: list = []
        inputs = torch_inputs(batch(model.config, text, suffix, seed=seed))
        tokens = model.generate(**inputs, seed=seed, log_probs=log_probs, **options)
        results.append((tokens.tolist(), torch.stack(log_probs).tolist()))
    return results


def assert_same(replayed: list[tuple[list, list]], launched: list[tuple[list, list]]) -> None:
    """On a GPU the log-probabilities may differ by a rounding: a padded product has other tiles."""
    for (tokens, scores), (expected_tokens, expected_scores) in zip(replayed, launched, strict=True):
        assert tokens == expected_tokens
        torch.testing.assert_close(
            torch.tensor(scores), torch.tensor(expected_scores), atol=5e-5 * CUDA, rtol=0
        )


def call(model: PaliGemma, text: list[int], **options) -> list[list[int]]:
    options = {"max_new_tokens": 5, "eos_token_id": -1, **options}
    return model.generate(**torch_inputs(batch(model.config, text, [0] * len(text))), **options).tolist()


# These prompts have the same length when it is rounded up to a multiple of 16. The second one makes the graph
# of the first token, and the third one uses it.
PROMPTS = [([3], [0]), ([9], [2]), ([1], [1])]


@pytest.mark.parametrize(("model", "options"), [
    pytest.param("Gemma 2", {}, id="greedy"),
    pytest.param("Gemma", {"do_sample": True, "temperature": 0.8, "top_p": 0.9}, id="sampled"),
], indirect=["model"])  # fmt: skip
def test_replays_compute_what_launches_compute(model, options):
    replayed = answers(model, PROMPTS, **options)
    assert len(model.pool.states) == 1
    model.graphs = False
    assert_same(replayed, answers(model, PROMPTS, **options))
    assert len({str(tokens) for tokens, _ in replayed}) == len(PROMPTS), "two prompts have the same answer"


def test_replays_of_a_ragged_batch(model):
    prompts = [([3, 9], [0, 2]), ([1, 5], [4, 0]), ([8, 2], [1, 3])]
    replayed = answers(model, prompts)
    model.graphs = False
    assert_same(replayed, answers(model, prompts))


def test_rows_end_while_others_go_on(model):
    """Tokens after an end have no effect on this call, nor on the next ones, which use the same cache."""
    full = call(model, [3, 9])
    ends = {"eos_token_id": [full[0][1], full[1][3]]}
    pad = model.config.pad_token_id
    expected = [[*full[0][:2], pad, pad], full[1][:4]]
    for _ in range(2):
        assert call(model, [3, 9], **ends) == expected
        assert call(model, [3, 9]) == full


def test_a_caller_who_stops_leaves_the_graphs_for_the_next(model):
    full, inputs = call(model, [3]), torch_inputs(batch(model.config, [3], [0]))
    run = model.pool.states[0]
    for _ in range(3):
        stream = model.stream(**inputs, max_new_tokens=5, eos_token_id=-1)
        assert [int(next(stream)) for _ in range(2)] == full[0][:2]
        stream.close()
        assert model.pool.states == [run]
    assert call(model, [3]) == full


def test_two_answers_at_once(model):
    alone = [call(model, [length]) for length in (3, 7)]
    inputs = [torch_inputs(batch(model.config, [length], [0])) for length in (3, 7)]
    for _ in range(2):
        streams = [model.stream(**given, max_new_tokens=5, eos_token_id=-1) for given in inputs]
        together = list(zip(*streams, strict=True))
        assert [[[int(tokens[n]) for tokens in together]] for n in range(2)] == alone
    assert len(model.pool.states) == 2


def test_sizes_have_graphs_of_their_own(model):
    kinds = ({}, {"max_new_tokens": 9}, {"do_sample": True, "temperature": 0.5, "seed": 0})
    first = [call(model, [3], **options) for options in kinds]
    short, long = bucket(21), bucket(25)
    expected = [(1, short, False, False), (1, long, False, False), (1, short, True, False)]
    assert [run.kind for run in model.pool.states] == expected
    assert first[1][0][:5] == first[0][0] != first[2][0]
    assert [call(model, [3], **options) for options in kinds] == first
    assert len(model.pool.states) == 3
    assert model.held_bytes >= sum(run.cache.keys_values.nbytes for run in model.pool.states)
    for rows in (2, 3):
        call(model, [3] * rows, max_new_tokens=1)
    assert [run.kind[0] for run in model.pool.states] == [1, 1, 2, 3]  # the least recently used is removed


def test_graphs_do_not_outlive_the_parameters_that_they_read(model):
    before = call(model, [3])
    other = copy.deepcopy(model)
    assert other.pool.states == []
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    other.load_state_dict({**other.state_dict(), name: -other.get_parameter(name)}, assign=True)
    assert model.pool.states
    after = call(other, [3])
    assert after != before
    for _ in range(2):
        assert call(other, [3]) == after
    other.load_state_dict(model.state_dict(), assign=True)
    assert [call(other, [3]) for _ in range(3)] == [before] * 3
    model.to(torch.float32)
    assert model.pool.states == []


def test_a_copy_is_packed_before_a_graph_knows_its_weights(model):
    other = copy.deepcopy(model)
    for _ in range(2):
        call(other, [17], max_new_tokens=1)  # more rows than the fused kernels take
    places = [parameter.data_ptr() for parameter in other.parameters()]
    assert call(other, [17]) == call(model, [17])
    assert [parameter.data_ptr() for parameter in other.parameters()] == places


def test_images_of_another_dtype_have_a_graph_of_their_own(model):
    inputs, scores = torch_inputs(batch(model.config, [3], [0])), []
    bfloat16 = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
    for given in (bfloat16, inputs, inputs, inputs):
        scores.append([])
        model.generate(**given, max_new_tokens=2, eos_token_id=-1, log_probs=scores[-1])
    assert torch.equal(torch.stack(scores[1]), torch.stack(scores[3]))
    assert not torch.equal(torch.stack(scores[0]), torch.stack(scores[1]))


def test_calls_in_inference_mode_and_others_take_turns(model):
    results = []
    for n in range(4):
        with torch.inference_mode(n % 2 == 0):
            results.append(call(model, [3]))
    assert results == results[:1] * 4


def test_without_memory_for_a_graph_the_kernels_are_launched(model, monkeypatch):
    def full(work, pool):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    expected = call(model, [3])
    monkeypatch.setattr(cuda_graph, "capture", full)
    message = r"no CUDA graph was made, and every kernel is launched from the host: CUDA out of memory\.$"
    with pytest.warns(UserWarning, match=message):
        assert [call(copy.deepcopy(model), [3]) for _ in range(2)] == [expected] * 2


def test_graphs_are_freed_with_the_model(model):
    other = copy.deepcopy(model)
    call(other, [3])
    run = weakref.ref(other.pool.states[0])
    gc.disable()  # reference counts alone must free them
    try:
        del other
        assert run() is None
    finally:
        gc.enable()


def test_damage_is_reported_and_its_graphs_are_removed(model):
    call(model, [3])
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = torch.nan
    for _ in range(2):
        with pytest.raises(PaliGemmaError, match=f"the weights {name} hold NaN"):
            call(model, [3])
    assert model.pool.states == []


@pytest.mark.skipif(CUDA, reason="the simulation of a graph is for a CPU")
class TestSimulatedGraphs:
    """The simulation finds mistakes that a graph would make."""

    def test_a_number_kept_by_the_host(self, model, monkeypatch):
        original, steps = DecodeState.next_positions, []

        def positions(self):
            steps.append(0)
            found = original(self)
            return found._replace(indices=torch.full_like(found.indices, 4 + 3 + len(steps) - 1))

        model.graphs = False
        right = call(model, [3])
        monkeypatch.setattr(DecodeState, "next_positions", positions)
        steps.clear()
        assert call(model, [3]) == right  # without a graph it is right
        model.graphs = True
        steps.clear()
        assert call(model, [3]) != right

    def test_a_value_read_from_a_tensor(self, model, monkeypatch):
        original = DecodeState.next_positions
        reads = lambda self: int(self.buffers.position[0]) and original(self)  # noqa: E731
        monkeypatch.setattr(DecodeState, "next_positions", reads)
        message = "no CUDA graph was made.*_local_scalar_dense is not possible in a graph"
        with pytest.warns(UserWarning, match=message):
            call(model, [3])


@pytest.mark.skipif(CUDA, reason="the simulation of streams is for a CPU")
class TestStreams:
    """A stream of its own copies the tokens to the host, here as late as possible."""

    def test_tokens_are_read_when_they_are_there(self, model, monkeypatch):
        prompts = [*PROMPTS, ([3, 9], [0, 2])]
        expected = answers(copy.deepcopy(model), prompts)
        pairs = streams.install(monkeypatch)
        assert answers(model, prompts) == expected
        assert len(pairs) == 2  # one row, two rows
        assert all(stream.done == len(stream.given) for stream in (*pairs[0], *pairs[1]))

    def test_a_step_does_not_wait_for_a_copy(self, model, monkeypatch):
        pairs, inputs = streams.install(monkeypatch), torch_inputs(batch(model.config, [3], [0]))
        call(model, [3])
        ((steps, copies),) = pairs
        tokens = model.stream(**inputs, max_new_tokens=5, eos_token_id=-1)
        next(tokens)  # the steps of later tokens are on the stream
        before = copies.done
        steps.synchronize()
        assert copies.done == before < len(copies.given)
        tokens.close()
        assert copies.done == len(copies.given)

    @pytest.mark.parametrize("mistake", [
        pytest.param((streams.Stream, "wait_event"), id="copied too early"),
        pytest.param((streams.Event, "synchronize"), id="read too early"),
    ])  # fmt: skip
    def test_a_missing_wait_is_found(self, model, monkeypatch, mistake):
        expected = call(copy.deepcopy(model), [3])
        streams.install(monkeypatch)
        monkeypatch.setattr(*mistake, lambda *_: None)
        try:
            found = call(model, [3])
        except PaliGemmaError:  # what is read too early may be no token at all
            found = None
        assert found != expected


def test_buckets():
    exact, above = (1, 512, 1280, 4608, 5120), (1, 513, 1281, 4609, 5121)
    assert [bucket(n) for n in exact] == [512, 512, 1280, 4608, 5120]
    assert [bucket(n) for n in above] == [512, 1280, 4608, 5120, 6144]
