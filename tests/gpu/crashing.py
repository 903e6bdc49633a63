"""A cell that loses its CUDA context, for ``test_faults``: importable, so that spawned processes find it."""

from __future__ import annotations

import torch

from hf_flash_plus.checks.compare import ERROR, OK, Row


def run(provider: str, feature: str, dtype: str, device: str) -> Row:
    row = Row(provider, feature, dtype, OK)
    try:
        if feature == "device assert":
            torch.zeros(3, device=device)[torch.tensor([7], device=device)].sum().item()
        else:
            torch.ones(3, device=device).sum().item()
    except Exception as error:
        row.status, row.note = ERROR, type(error).__name__
    return row
