"""What says that a GPU's memory is full."""

from __future__ import annotations

import torch

#: How notes say that memory was missing: nothing that tells of the model where others use the GPU, too.
MEMORY = "out of GPU memory"


def out_of_memory(problem: BaseException) -> bool:
    """Whether an exception says that the GPU has no memory left: torch's own, and those of CUDA, cuBLAS and Triton."""
    if isinstance(problem, torch.OutOfMemoryError):
        return True
    text = str(problem)
    return isinstance(problem, RuntimeError) and ("out of memory" in text or "_ALLOC_FAILED" in text)
