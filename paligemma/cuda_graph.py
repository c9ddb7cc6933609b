"""A step of a generation as a CUDA graph, and the streams on which steps and copies run."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GraphedStep:
    """A function of some tensors. The first call runs it, which compiles and loads its kernels. The second
    call captures it as a graph, and that call and all later ones replay the graph. If the capture fails, for
    lack of memory or because of a limit of the driver, a warning says so, and every call runs the
    function."""

    def __init__(self, inputs: list[Tensor]):
        self.inputs, self.warm, self.failed, self.replay, self.nbytes = inputs, False, False, None, 0

    def run(self, work: Callable[..., None], inputs: tuple[Tensor, ...], pool: Any) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        if self.warm and not self.failed and self.replay is None:
            try:
                self.replay, self.nbytes = capture(lambda: work(*self.inputs), pool)
            except RuntimeError as error:
                self.failed, reason = True, str(error).splitlines()[0]
                message = f"no CUDA graph was made, and every kernel is launched from the host: {reason}"
                warnings.warn(message, stacklevel=2)
        if self.replay:
            self.replay()
        else:
            work(*self.inputs)
            self.warm = True


def capture(work: Callable[[], None], pool: Any) -> tuple[Callable[[], None], int]:
    """A function that replays the launches of work(), and the number of bytes that the graph holds. Like
    torch.cuda.graph, but without a garbage collection before the capture."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph cannot use memory that torch keeps for other allocations
    torch.cuda.current_blas_handle()  # creates this thread's handle, which a capture cannot do
    # The workspaces of products are then allocated in this graph's memory, and not in that of another,
    # as in torch's cudagraph_trees.
    clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    clear_workspaces()
    graph, before, collecting = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(), gc.isenabled()
    gc.disable()  # a finalizer might wait for the device
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    finally:
        clear_workspaces()
        if collecting:
            gc.enable()
    return graph.replay, torch.cuda.memory_reserved() - before


def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | tuple[None, None]:
    """A stream for the steps, and one for the copies of their tokens to the host, so that the next step does
    not wait for a copy. None on a CPU."""
    return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else (None, None)
