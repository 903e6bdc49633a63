"""What all tests share: no network, no settings inherited from the shell, one thread per worker, GPU tests skipped."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for _name in ("FLASH_ATTENTION_USE_FLAGGEMS", "HF_FLASH_PLUS_PROVIDER", "FLASH_ATTENTION_DETERMINISTIC"):
    os.environ.pop(_name, None)

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
