"""What a machine is, as far as it decides results and speed. Importing this does not import torch."""

import os
import platform
import sys
import time
from pathlib import Path


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The instruction sets that the CPU has, in the system's names; empty where the system does not say."""
    return (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()


def _cpuinfo() -> dict[str, str]:
    """Of the first core, on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {
        name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())
    }


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not on Linux: all that there is
        return (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else sys.maxsize
        )
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
        return min(free, most - used + cached)
    except (OSError, ValueError, StopIteration):  # no container, or one without a limit
        return free


def read_bandwidth(device: str, size: int | None = None) -> float | None:
    """GB/s at which a sum reads `size` bytes that no cache holds (256 MB; on a GPU 1 GB): the best of five,
    after one that warms up.

    None where twice the size is not free."""
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
