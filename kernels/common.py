"""Constants and functions that several kernels share."""

import os

import triton
import triton.language as tl

NONE = tl.constexpr(-1e30)  # the maximum before any score; with -inf, the difference -inf - -inf would be NaN
LOG2E = tl.constexpr(1.4426950408889634)  # softmax in powers of two: the hardware's instruction is exp2

DEPENDENT = os.environ.get("PALIGEMMA_PDL", "1") != "0"  # programmatic dependent launch; "0" turns it off


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel start as soon as there is room for it and every program of this kernel has called
    this function."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended. Before this call, a kernel may read weights, which
    no kernel writes, and must not write. Every program must call it; otherwise, a later kernel does not wait
    for the kernels before this one."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def capped(scores, softcap, dtype: tl.constexpr):
    """softcap * tanh(scores / softcap). A tanh computed from exp is inaccurate for small arguments, because
    of cancellation; the error matters in float32 only."""
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
    """Whether each kernel of a decode is launched before the previous one has ended, so that it can begin to
    load weights. True from sm_90 on, but not on sm_120, where captured launches of this kind have failed."""
    return DEPENDENT and 90 <= architecture() < 120


def blocks_of(size: int) -> tuple[int, int]:
    """How many rows of `size` features a program of 128 threads computes, and how many features at a time. A
    block of these rows and features has 1024 values, which are 16 bytes of a half-precision type per thread.

    2304, 3584 and 4608 features are 9 x 256, 7 x 512 and 9 x 512, so no thread is idle; with one block of the
    next power of two, up to 44 % would be. If no power of two of at least 128 divides `size`, the last block
    is masked."""
    divisor = size & -size
    block = min(divisor if divisor >= 128 else triton.next_power_of_2(size), 1024)
    return 1024 // block, block
