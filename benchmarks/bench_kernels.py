"""Times every kernel at every production shape, and other implementations, with pytest-benchmark.

    pytest benchmarks --benchmark-only [-k "decode_attention and 4200"] [--benchmark-json FILE]

pytest-benchmark reads a clock that advances only by the device time of each call, which CUDA events measure
around graph replays. On a CPU the shapes are tiny and the kernels run in the interpreter: this shows that the
benchmark runs, not how fast a kernel is.
"""

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.stages import chosen, timed
from benchmarks.whole_model import device_name

CPU = not torch.cuda.is_available()
DEVICE = "cpu" if CPU else "cuda"
DTYPES = ("bfloat16", "float16")
ODD, PRODUCTION = chosen(CPU)
CONTENDERS = [(case, name) for case in PRODUCTION or ODD for name in timed(case, CPU)]

measured = [0.0]  # seconds of device work so far


def device_clock() -> float:
    return measured[0]


def label(x: Case | str) -> str:
    return x.name if isinstance(x, Case) else x + " interpreted" * (CPU and x == "triton")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.mark.benchmark(timer=device_clock)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "contender"), CONTENDERS, ids=label)
def test_time(benchmark, case: Case, contender: str, dtype: str, limits: dict[str, float]):
    torch.manual_seed(0)
    sets = timing.input_sets(case, getattr(torch, dtype), DEVICE)
    expected = case.seen(*timing.tensors(case.plain(*(x.clone() for x in sets[0]))))
    try:
        call = timing.checked(case, timed(case, CPU)[contender](), sets[0], expected)
        measure = timing.timer(call, sets, DEVICE)
    except Exception as error:
        if contender == "triton" or timing.is_fatal(error):
            raise
        pytest.skip(timing.one_line(error))
    samples = []

    def once() -> None:
        samples.append(measure())
        measured[0] += samples[-1]

    benchmark.group = f"{case.name}, {dtype}"
    benchmark.pedantic(once, rounds=2 if CPU else timing.ROUNDS, warmup_rounds=1)
    figures = timing.describe(case, samples[1:] or samples, getattr(torch, dtype), limits)
    known = {"dtype": dtype, "contender": contender, "device": device_name(DEVICE), "limits": limits}
    benchmark.extra_info.update(figures, **known, interpreted=CPU and contender == "triton")
