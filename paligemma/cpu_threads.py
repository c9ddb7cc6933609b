"""The threads on which torch computes on a CPU.

An operation of a few microseconds on two threads waits for the slower thread. If another process keeps a
core busy, the wait takes milliseconds: on two Zen 5 cores of which one was busy, a token of the demo model
took 220 to 340 ms on two threads, and 3.4 ms on one."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_outside = threading.local()  # .count: the threads that this Python thread has outside of `one_thread`


@contextmanager
def one_thread() -> Iterator[None]:
    """In this block, the torch operations of this Python thread run on one thread. `threads` still returns
    the number outside of the block.

    OpenMP has a number for each Python thread, and torch uses it; torch.set_num_threads would change the
    number of other Python threads too. If torch does not use such an OpenMP (on Windows and macOS), the block
    changes nothing."""
    library, count = _openmp(), torch.get_num_threads()
    if library is None or count == 1:
        yield
        return
    _outside.count = count
    library.omp_set_num_threads(1)
    try:
        yield
    finally:
        library.omp_set_num_threads(count)
        del _outside.count


def threads() -> int:
    """The number of threads on which this Python thread may compute."""
    return getattr(_outside, "count", None) or torch.get_num_threads()


@contextmanager
def keeping_torch_threads() -> Iterator[None]:
    """After this block, torch uses as many threads as before, even if the block used the OpenMP library that
    torch uses."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before and (library := _openmp()):
            library.omp_set_num_threads(before)


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch uses, if its number of threads can be set for one Python thread alone."""
    try:
        library = ctypes.CDLL(None)
        library.omp_set_num_threads  # noqa: B018  raises AttributeError if it does not exist
    except (OSError, TypeError, AttributeError):
        return None
    return library if "OpenMP" in torch.__config__.parallel_info() else None
