"""The rotary kernel compiles for every architecture without spills."""

from __future__ import annotations

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from hf_flash_plus.kernels import rotary, tiles

from .compiling import TARGETS, compile_launch, compiling_for, warm_up

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 32), (256, 256)])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_compiles(arch: str, dims: tuple[int, int], interleaved: bool) -> None:
    head_dim, rotary_dim = dims
    table = FP32 if interleaved else BF16
    q, k, q_out, k_out = (torch.empty(2, n, 9, head_dim, dtype=BF16, device="meta") for n in (32, 8, 32, 8))
    cos, sin = (torch.empty(1, 9, rotary_dim, dtype=table, device="meta") for _ in range(2))
    with compiling_for(arch):
        for backward in (False, True):
            rotation = rotary.Rotation(
                tiles.device_info(q.device), head_dim, rotary_dim, interleaved, interleaved, table == BF16, backward
            )
            built = rotary.rotary_launch(rotation, q, k, cos, sin, q_out, k_out)
            assert compile_launch(built).spilled == 0
            asm = warm_up(built).asm  # a fused product and sum is rounded once: other bits than torch's
            assert not re.search(r"fma\.rn\.(ftz\.)?f32|v_(pk_)?f?m(a|ac)_f32", asm.get("ptx") or asm["amdgcn"])
