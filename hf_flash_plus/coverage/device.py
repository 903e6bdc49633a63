"""Whether the device still works for this process: after a fault on a GPU everything that it does there fails."""

from __future__ import annotations

import torch

from .memory import out_of_memory


def settle(device: str) -> None:
    """Wait for all that was launched, so that a fault on a GPU is raised for the run that made it.

    Raises:
        RuntimeError: something launched before has failed.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def answers(device: str) -> bool:
    """Whether the device still works here; one that is merely out of memory does."""
    try:
        settle(device)
    except RuntimeError as problem:
        return out_of_memory(problem)
    return True
