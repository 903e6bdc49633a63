"""The interpreter's bounds, on a kernel that keeps to its memory and on ones that do not."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
InterpreterError = pytest.importorskip("triton.runtime.errors").InterpreterError


@triton.jit
def copy(source_ptr, target_ptr, n, ahead, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + offsets + ahead, mask=offsets < n, other=0.0)
    tl.store(target_ptr + offsets, values, mask=offsets < n)


@pytest.mark.parametrize(
    "length, room, ahead, what",
    [(5, 5, 0, None), (5, 5, 1, "a load of 1 elements"), (5, 4, 0, "a store of 1 elements"), (5, 5, -1, "a load of 1")],
)
def test_what_leaves_its_memory_is_an_error(length: int, room: int, ahead: int, what: str | None) -> None:
    source, target = torch.rand(length), torch.zeros(room)
    if what is None:
        copy[(1,)](source, target, length, ahead, 8)
        assert torch.equal(source, target)
        return
    with pytest.raises(InterpreterError, match=what):
        copy[(1,)](source, target, length, ahead, 8)
