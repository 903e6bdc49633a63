"""The memory of a GPU that other processes may use, too."""

from __future__ import annotations

import gc
import time

import pytest
import torch


def free_gib() -> float:
    """GiB that are free on the current device, without what this process keeps in torch's cache."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / 2**30


def wait_for_memory(gib: float, seconds: float = 60.0) -> float:
    """Wait until that much is free, but not for ever; returns what is."""
    gc.collect()
    end = time.monotonic() + seconds
    while (free := free_gib()) <= gib and time.monotonic() < end:
        time.sleep(0.2)
    return free


def needs_memory(gib: float) -> None:
    """Skip a test that needs more than others leave of the GPU: at once where it has less, else after a wait."""
    total = torch.cuda.mem_get_info()[1] / 2**30
    if total < gib:
        pytest.skip(f"needs {gib:g} GiB of GPU memory, the GPU has {total:.0f}")
    free = wait_for_memory(gib)
    if free <= gib:
        pytest.skip(f"needs {gib:g} GiB of free GPU memory, others leave {free:.1f} of {total:.0f}")
