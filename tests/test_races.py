"""Replays in which kernels overlap, and the mistakes that they find. Here a CPU runs every kernel as early as
a GPU would let it."""

from functools import partial

import overlap
import pytest
import torch
import triton
import triton.language as tl

from benchmarks import cases, generation, races
from benchmarks.generation import Cell
from paligemma.kernels import common, decode_attention, gemv, next_token, top_p_histogram, top_p_search

CASES = [
    cases.qkv_case("", 1, 33, (2, 1, 16), False, None),
    cases.project_case("", 1, 33, 7, True, None),
    cases.gate_up_case("", 1, 33, 20, True, None),
    cases.head_case("", 1, 33, 70, False, None, None, True),
    cases.decode_case("", [40], 64, (2, 1, 16)),
    cases.next_case("", 1, 33, 20, 70),
    *cases.sampling_cases(1, 70),
]
MODULES = {
    "decode_attention": decode_attention, "next_token": next_token,
    "top_p_histogram": top_p_histogram, "top_p_search": top_p_search,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _overlapping(monkeypatch):
    overlap.install(monkeypatch)
    with torch.no_grad():
        yield


@pytest.fixture
def once(monkeypatch):
    """Limits replays to one, because every replay is the same here."""
    monkeypatch.setattr(races, "replays", partial(races.replays, most=1))


def deaf(monkeypatch, module) -> None:
    """The kernels of the module start at once and wait for nothing."""
    monkeypatch.setattr(module, "wait_for_dependencies", common.launch_dependents)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_a_kernel_that_does_not_wait_is_found(monkeypatch, case):
    torch.manual_seed(0)
    inputs = case.make("cpu", torch.bfloat16)
    assert races.replays_of_case(case, inputs, False) == {"replays": 1, "values_that_differed": 0}
    deaf(monkeypatch, MODULES.get(case.kernel, gemv))
    assert races.replays_of_case(case, inputs, False)["values_that_differed"] > 0


@pytest.mark.usefixtures("once")
def test_a_fill_between_two_kernels_would_hide_it(monkeypatch):
    """This is why the graph of the kernels must not contain such an operation."""
    case, fill, pass_on = CASES[1], torch.zeros(1), races.pass_on
    inputs = case.make("cpu", torch.bfloat16)
    deaf(monkeypatch, gemv)

    def pass_on_and_fill(source, destination):
        pass_on(source, destination)
        fill.fill_(0)

    monkeypatch.setattr(races, "pass_on", pass_on_and_fill)
    assert races.replays_of_case(case, inputs, False)["values_that_differed"] == 0


@pytest.mark.parametrize("early", [False, True])
def test_a_kernel_that_writes_too_early_is_found(early):
    """It writes into memory that the previous kernel has not read yet."""
    source, memory = torch.arange(40, dtype=torch.uint8), torch.zeros(40, dtype=torch.uint8)
    later = torch.full((40,), 77, dtype=torch.uint8)

    def launch():
        out = torch.empty(40, dtype=torch.uint8)
        races.pass_on(memory, out)
        early_copy[(1,)](later, memory, WAIT=not early, PDL=common.dependent(), launch_pdl=common.dependent())
        return out

    found = races.replays(lambda: memory.copy_(source), launch, False, guarded=False, most=1)
    assert (found["values_that_differed"] > 0) == early


@triton.jit
def early_copy(from_ptr, to_ptr, WAIT: tl.constexpr, PDL: tl.constexpr):
    i = tl.arange(0, 64)
    if WAIT:
        common.wait_for_dependencies(PDL)
    tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < 40, other=0), mask=i < 40)


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("module", [None, gemv, decode_attention], ids=["none", "gemv", "decode_attention"])
def test_a_step_in_which_a_kernel_does_not_wait_is_found(monkeypatch, module):
    step, reset = generation.step_of(Cell(14, 1, "triton"), True)
    if module:
        deaf(monkeypatch, module)
    steps = lambda: (step(), step())[-1]  # noqa: E731
    assert (races.replays(reset, steps, False)["values_that_differed"] > 0) == bool(module)


def test_one_after_another():
    assert common.dependent()
    with races.one_after_another():
        assert not common.dependent()
    assert common.dependent()


def test_a_second_launch_that_takes_other_memory_is_refused():
    sizes = iter((3, 3, 4))
    with pytest.raises(RuntimeError, match="asks for other memory than the first"):
        races.replays(lambda: None, lambda: torch.empty(next(sizes)), True)
