"""The threads of the Numba kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

import numba

from ..cpu_threads import keeping_torch_threads, threads


@contextmanager
def own_threads() -> Iterator[int]:
    """In this block, kernels use the number of threads that is given. After it, torch uses as many threads as
    before: Numba's first call changes them."""
    with keeping_torch_threads():
        count = min(threads(), numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(count)
        yield count
