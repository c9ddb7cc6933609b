"""What the kernels share."""

import os

import triton
import triton.language as tl

NONE = tl.constexpr(-1e30)  # the maximum before any score: with -inf, -inf - -inf would be NaN
LOG2E = tl.constexpr(
    1.4426950408889634
)  # softmax in powers of two: exp2 is the instruction that the hardware has


DEPENDENT = os.environ.get("PALIGEMMA_PDL", "1") != "0"  # programmatic dependent launch; "0" turns it off


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it, once every program of this one has called
    this."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended. Before this call a kernel may read weights, which
    nobody writes, and may write nothing. Every program must call it, or a later kernel does not wait for this
    one's predecessors."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def capped(scores, softcap, dtype: tl.constexpr):
    """softcap * tanh(scores / softcap). tanh from exp loses the small arguments to cancellation, which only
    float32 notices."""
    x = scores / softcap
    tanh = 2 * tl.sigmoid(2 * x) - 1
    if dtype == tl.float32:
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        tanh = tl.where(tl.abs(x) < 0.25, series, tanh)
    return tanh * softcap


def architecture() -> int:
    """The compute capability that kernels are compiled for, such as 90; 0 in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    return triton.runtime.driver.active.get_current_target().arch


def dependent() -> bool:
    """Whether the kernels of a decode are launched before the kernels before them have ended, so that they
    can begin to load weights. From sm_90 on, but not on sm_120, where captured launches of this kind have
    failed."""
    return DEPENDENT and 90 <= architecture() < 120


def blocks_of(size: int) -> tuple[int, int]:
    """Rows of `size` features that a program of 128 threads takes, and how many features at a time: together
    up to 1024, 16 bytes of a half-precision type a thread.

    2304, 3584 and 4608 features are 9 x 256, 7 x 512 and 9 x 512: no lane is idle, where one power of two
    would idle 44 %. Where no power of two from 128 divides `size`, the last block is masked."""
    divisor = size & -size
    block = min(divisor if divisor >= 128 else triton.next_power_of_2(size), 1024)
    return 1024 // block, block
