"""Recorded steps: replayed, they say what launched ones say, whatever prompt, image and length they are
given."""

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
pytestmark = pytest.mark.filterwarnings("error:no CUDA graph")  # it would say the same without one
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
TEXT = {"Gemma": SMALL, "Gemma 2": {**GEMMA_2, **SMALL, "sliding_window": 9, "query_pre_attn_scalar": 16}}
VISION = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 1,
    "image_size": 28,
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory, tokenizer_model):
    return {
        name: write_checkpoint(
            tmp_path_factory.mktemp("recorded") / "model",
            tokenizer_model,
            config=config_dict(text=text, vision=VISION),
        )
        for name, text in TEXT.items()
    }


@pytest.fixture
def model(directories, monkeypatch, request):
    """On a GPU with its graphs; on a CPU with what stands for them, on the kernels in Triton's
    interpreter."""
    monkeypatch.setattr(decode_state, "BUCKETS", (24, 48))
    directory = directories[getattr(request, "param", "Gemma")]
    if not CUDA:
        monkeypatch.setattr(cuda_graph, "capture", capture)
        monkeypatch.setattr(PaliGemma, "uses_graphs", property(lambda self: self.graphs))
    return load_hf_model(directory, dtype="float32", backend="triton", device="cuda" if CUDA else "cpu")[0]


def answers(model: PaliGemma, prompts: list, **options) -> list[tuple[list, list]]:
    """Tokens and log-probabilities of one call after another."""
    said = []
    for seed, (text, suffix) in enumerate(prompts):
        log_probs: list = []
        inputs = torch_inputs(batch(model.config, text, suffix, seed=seed))
        tokens = model.generate(
            **inputs, max_new_tokens=5, eos_token_id=-1, seed=seed, log_probs=log_probs, **options
        )
        said.append((tokens.tolist(), torch.stack(log_probs).tolist()))
    return said


def call(model: PaliGemma, text: list[int], **options) -> list[list[int]]:
    return model.generate(
        **torch_inputs(batch(model.config, text, [0] * len(text))),
        **{"max_new_tokens": 5, "eos_token_id": -1, **options},
    ).tolist()


PROMPTS = [
    ([3], [0]),
    ([9], [2]),
    ([1], [1]),
]  # of one length in 16s; the first token's graph is made by the second, and used by the third


@pytest.mark.parametrize(
    ("model", "options"),
    [("Gemma 2", {}), ("Gemma", {"do_sample": True, "temperature": 0.8, "top_p": 0.9})],
    indirect=["model"],
    ids=["greedy", "sampled"],
)
def test_replays_say_what_launches_say(model, options):
    replayed = answers(model, PROMPTS, **options)
    assert len(model.pool.states) == 1
    model.graphs = False
    for one, other in zip(replayed, answers(model, PROMPTS, **options), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(
            torch.tensor(one[1]), torch.tensor(other[1]), atol=5e-5 * CUDA, rtol=0
        )  # where a padded product has other tiles
    assert len({str(tokens) for tokens, _ in replayed}) == len(PROMPTS), "these weights always say the same"


def test_replays_of_a_ragged_batch(model):
    prompts = [([3, 9], [0, 2]), ([1, 5], [4, 0]), ([8, 2], [1, 3])]
    replayed = answers(model, prompts)
    model.graphs = False
    for one, other in zip(replayed, answers(model, prompts), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(
            torch.tensor(one[1]), torch.tensor(other[1]), atol=5e-5 * CUDA, rtol=0
        )  # where a padded product has other tiles


def test_rows_end_while_others_go_on(model):
    """Tokens after an end are not seen, by this call or the next ones, whose cache it has been in."""
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
    assert [run.kind for run in model.pool.states] == [
        (1, bucket(21), False, False),
        (1, bucket(25), False, False),
        (1, bucket(21), True, False),
    ]
    assert first[1][0][:5] == first[0][0] != first[2][0]
    assert [call(model, [3], **options) for options in kinds] == first
    assert len(model.pool.states) == 3
    assert model.held_bytes >= sum(run.cache.keys_values.nbytes for run in model.pool.states)
    for rows in (2, 3):
        call(model, [3] * rows, max_new_tokens=1)
    assert [run.kind[0] for run in model.pool.states] == [1, 1, 2, 3]  # the least recent is forgotten


def test_graphs_do_not_outlive_the_parameters_that_they_read(model):
    before = call(model, [3])
    other = copy.deepcopy(model)
    assert other.pool.states == []
    weight = other.language_model.model.layers[0].mlp.down_proj.weight
    other.load_state_dict(
        {**other.state_dict(), "language_model.model.layers.0.mlp.down_proj.weight": -weight}, assign=True
    )
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
    for pixels in [inputs["pixel_values"].to(torch.bfloat16)] + [inputs["pixel_values"]] * 3:
        scores.append([])
        model.generate(
            **{**inputs, "pixel_values": pixels}, max_new_tokens=2, eos_token_id=-1, log_probs=scores[-1]
        )
    assert torch.equal(torch.stack(scores[1]), torch.stack(scores[3]))
    assert not torch.equal(torch.stack(scores[0]), torch.stack(scores[1]))


def test_calls_in_inference_mode_and_others_take_turns(model):
    said = []
    for n in range(4):
        with torch.inference_mode(n % 2 == 0):
            said.append(call(model, [3]))
    assert said == said[:1] * 4


def test_without_room_for_a_graph_it_is_launched(model, monkeypatch):
    def full(work, pool):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    expected = call(model, [3])
    monkeypatch.setattr(cuda_graph, "capture", full)
    with pytest.warns(
        UserWarning,
        match=r"no CUDA graph was made, and every kernel is launched from the host: CUDA out of memory\.$",
    ):
        assert [call(copy.deepcopy(model), [3]) for _ in range(2)] == [expected] * 2


def test_graphs_go_with_the_model(model):
    other = copy.deepcopy(model)
    call(other, [3])
    run = weakref.ref(other.pool.states[0])
    gc.disable()  # they are in no circle
    try:
        del other
        assert run() is None
    finally:
        gc.enable()


def test_damage_is_told_and_its_graphs_are_thrown_away(model):
    call(model, [3])
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.down_proj.weight[3, 5] = torch.nan
    for _ in range(2):
        with pytest.raises(
            PaliGemmaError,
            match=r"the weights language_model\.model\.layers\.0\.mlp\.down_proj\.weight hold NaN",
        ):
            call(model, [3])
    assert model.pool.states == []


@pytest.mark.skipif(CUDA, reason="what stands for a graph on a CPU")
class TestStandIn:
    """It finds what a graph would get wrong."""

    def test_a_number_kept_by_the_host(self, model, monkeypatch):
        original, steps = DecodeState.next_positions, []

        def places(self):
            steps.append(0)
            found = original(self)
            return found._replace(indices=torch.full_like(found.indices, 4 + 3 + len(steps) - 1))

        model.graphs = False
        right = call(model, [3])
        monkeypatch.setattr(DecodeState, "next_positions", places)
        steps.clear()
        assert call(model, [3]) == right  # launched, it is right
        model.graphs = True
        steps.clear()
        assert call(model, [3]) != right

    def test_a_look_at_a_tensor(self, model, monkeypatch):
        original = DecodeState.next_positions
        monkeypatch.setattr(
            DecodeState, "next_positions", lambda self: int(self.buffers.position[0]) and original(self)
        )
        with pytest.warns(
            UserWarning, match="no CUDA graph was made.*_local_scalar_dense has no place in a graph"
        ):
            call(model, [3])


@pytest.mark.skipif(CUDA, reason="what stands for streams on a CPU")
class TestStreams:
    """The tokens are copied to the host on a stream of their own, as late as that may be."""

    def test_tokens_are_read_when_they_are_there(self, model, monkeypatch):
        prompts = [*PROMPTS, ([3, 9], [0, 2])]
        expected = answers(copy.deepcopy(model), prompts)
        made = streams.install(monkeypatch)
        assert answers(model, prompts) == expected
        assert len(made) == 2  # one row, two rows
        assert all(stream.done == len(stream.given) for stream in (*made[0], *made[1]))

    def test_a_step_does_not_wait_for_a_copy(self, model, monkeypatch):
        made = streams.install(monkeypatch)
        call(model, [3])
        ((steps, copies),) = made
        tokens = model.stream(
            **torch_inputs(batch(model.config, [3], [0])), max_new_tokens=5, eos_token_id=-1
        )
        next(tokens)  # the others are under way
        before = copies.done
        steps.synchronize()
        assert copies.done == before < len(copies.given)
        tokens.close()
        assert copies.done == len(copies.given)

    @pytest.mark.parametrize(
        "mistake",
        [(streams.Stream, "wait_event"), (streams.Event, "synchronize")],
        ids=["copied too early", "read too early"],
    )
    def test_a_wait_that_is_missing_is_found(self, model, monkeypatch, mistake):
        expected = call(copy.deepcopy(model), [3])
        streams.install(monkeypatch)
        monkeypatch.setattr(*mistake, lambda *_: None)
        assert call(model, [3]) != expected


def test_buckets():
    assert [bucket(n) for n in (1, 512, 513, 1280, 1281, 4608, 4609, 5120, 5121)] == [
        512,
        512,
        1280,
        1280,
        4608,
        4608,
        5120,
        5120,
        6144,
    ]
