"""The properties of a machine that affect results and speed. Importing this module does not import torch."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The CPU's instruction sets, by the system's names; an empty list if the system does not list them."""
    return (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()


def _cpuinfo() -> dict[str, str]:
    """The first core's entries in /proc/cpuinfo; an empty dict on systems other than Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def free_memory() -> int:
    """Bytes of memory that this process may still allocate: what the machine or the container has left."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all of the machine's memory
        if hasattr(os, "sysconf"):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return sys.maxsize
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return min(free, most - used + cached)
    except (OSError, ValueError, StopIteration):  # no container, or one without a limit
        return free


def free_bytes(device: "torch.device") -> int:
    """Bytes of memory that may still be allocated on a device. What torch has reserved on a GPU and does not
    use is free too."""
    if device.type != "cuda":
        return free_memory()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def read_bandwidth(device: str, size: int | None = None) -> float | None:
    """The rate in GB/s at which a sum reads `size` bytes, by default 256 MB, or 1 GB on a GPU, which exceeds
    the caches: the best of five runs, after one to warm up. None if less than twice the size is free."""
    import torch

    size = size or (1 << 28 if device == "cpu" else 1 << 30)
    free = free_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]
    if free < 2 * size:
        return None
    x = torch.ones(size // 4, device=device)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds[1:]) / 1e9
