"""Compile the launches of :mod:`hf_flash_plus.kernels` for GPUs that this machine need not have."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import launch, tiles
from hf_flash_plus.masks import CAUSAL, AttentionMask


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's target, shared memory of a program, multiprocessors."""

    gpu: GPUTarget
    shared_memory: int
    n_cores: int


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 108),
    "sm86": Target(GPUTarget("cuda", 86, 32), 99 * 1024, 84),
    "sm90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 132),
    "sm100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 148),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), 64 * 1024, 104),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 304),
}
_BIN = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/")


class _Driver:
    """Stands in for a GPU driver: only these are asked for before a launch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)  # Triton keeps compiled kernels by device number

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(name: str) -> Iterator[None]:
    """Inside the block, kernels compile for the named target and tiles are chosen for it."""
    info = tiles.DeviceInfo(name, TARGETS[name].n_cores)
    with (
        mock.patch.object(driver, "_active", _Driver(name)),
        mock.patch.object(tiles, "device_info", lambda _device: info),
    ):
        yield


@dataclass(frozen=True)
class Compiled:
    """What came out: bytes of shared memory, registers, and bytes of registers spilled (NVIDIA: the stack)."""

    shared: int
    registers: int
    spilled: int


def _find(pattern: str, text: str) -> int:
    return int(re.search(pattern, text).group(1))


def warm_up(built: launch.Launch) -> Any:
    """Triton's compiled kernel for a launch, which does not take place."""
    return built.plan.kernel.warmup(*built.arguments, grid=(built.n_programs,), **built.plan.options)


def compile_launch(built: launch.Launch) -> Compiled:
    """Compile what a launch would run, and read what the assembler says."""
    kernel = warm_up(built)
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return Compiled(shared, _find(r"\.vgpr_count:\s+(\d+)", text), 4 * _find(r"\.vgpr_spill_count:\s+(\d+)", text))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([_BIN + "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    return Compiled(shared, _find(r"REG:(\d+)", usage), _find(r"STACK:(\d+)", usage))


def call(
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    batch: int = 2,
    seqlen: int = 4096,
    nheads: int = 32,
    nheads_k: int = 8,
    mask: AttentionMask = CAUSAL,
    **numbers: object,
) -> AttentionInputs:
    """A call without data (meta tensors)."""
    meta = {"dtype": dtype, "device": "meta"}
    q = torch.empty(batch, seqlen, nheads, head_dim, **meta)
    k = torch.empty(batch, seqlen, nheads_k, head_dim, **meta)
    v = torch.empty(batch, seqlen, nheads_k, v_head_dim or head_dim, **meta)
    return AttentionInputs(q, k, v, head_dim**-0.5, mask, **numbers)


def launches(
    inputs: AttentionInputs, bias_grad: bool = False, dout: torch.Tensor | None = None
) -> dict[str, launch.Launch]:
    """All launches of a call, forward and backward, by name."""
    parts = launch.prepare(inputs)
    batch, nheads, _, seqlen_q, _ = parts.sizes
    q, device = inputs.query, inputs.query.device
    out = torch.empty(batch, seqlen_q, nheads, inputs.v_head_dim, dtype=q.dtype, device=device)
    lse = torch.empty(batch, nheads, seqlen_q, dtype=torch.float32, device=device)
    summary = torch.empty(1, dtype=torch.int32, device=device) if parts.structure.has_intervals else None
    splits = launch.dkdv_splits(parts)
    dk = torch.empty(1, dtype=q.dtype if splits == 1 else torch.float32, device=device)
    dscores = None
    if bias_grad:
        dscores = torch.empty(1, dtype=launch.dscores_dtype(inputs.mask.bias), device=device)
    dout = out if dout is None else dout
    return {
        "forward": launch.forward_launch(parts, out, lse),
        "preprocess": launch.preprocess_launch(parts, out, dout, lse, lse, summary),
        "dq": launch.dq_launch(parts, dout, lse, lse, q, dscores),
        "dkdv": launch.dkdv_launch(parts, dout, lse, lse, summary, dk, dk, splits),
    }


def barriers(ptx: str) -> list[int]:
    """Where a Gluon kernel's mbarriers lie in its shared memory, in bytes.

    Fails unless each is invalidated, as often as it is initialised: only then the compiler leaves its memory to it
    until the end (``hopper.primitives.retire`` says what happens otherwise).
    """
    base = re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx)
    addresses = {register: 0 for register in base}
    for to, of, offset in re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx):
        if of in base:
            addresses[to] = int(offset)
    begun, ended = (
        [addresses[register] for register in re.findall(rf"mbarrier\.{what}\.shared(?:::cta)?\.b64 \[(%r\d+)\]", ptx)]
        for what in ("init", "inval")
    )
    assert begun and sorted(begun) == sorted(ended), f"mbarriers at {sorted(begun)}, invalidated {sorted(ended)}"
    lent = [
        at
        for count, bits, to in re.findall(r"st\.shared(?:\.v(\d))?\.\w(\d+)\s+\[global_smem\+(\d+)\]", ptx)
        for at in begun
        if at - int(count or 1) * int(bits) // 8 < int(to) < at + 8
    ]
    assert not lent, f"something else is stored over the mbarriers at {lent}"
    return begun
