"""The threads of the Numba kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import numba

from ..cpu_threads import keeping_torch_threads, threads
from .cpu_gemv import ONE_AT_A_TIME


@contextmanager
def own_threads() -> Iterator[int]:
    """In this block, no other Python thread runs a kernel, and a kernel may use the number of threads that is
    given. After it, torch uses as many threads as before."""
    with keeping_torch_threads(), ONE_AT_A_TIME:
        count = min(threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(count)
        yield count
