"""The rotary kernel against torch's operations, to the bit."""

from __future__ import annotations

import pytest
import torch

from hf_flash_plus import rotary
from hf_flash_plus.rotary import FORMS, Form
from tests.kernels.rotary_cases import check, names

pytest.importorskip("triton")
FP32, FP16 = torch.float32, torch.float16
DTYPES = [(FP32, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP16)]


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtypes", DTYPES, ids=names)
@pytest.mark.parametrize("form", FORMS, ids=names)
def test_forms(form: Form, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, table = dtypes
    width = 12 if form.partial else 16
    q, k = (random(2, 3, heads, 16, dtype=dtype, seed=heads).transpose(1, 2) for heads in (3, 1))
    cos, sin = (random(2, 3, width, dtype=table, seed=seed) for seed in (7, 8))
    check(q, k, cos, sin, form)


@pytest.mark.parametrize("heads", [(5, 5), (33, 3)])
@pytest.mark.parametrize("head_dim", [(8, 2), (80, 80), (96, 32)])
def test_widths(heads: tuple[int, int], head_dim: tuple[int, int]) -> None:
    q, k = (random(1, 2, n, head_dim[0], dtype=FP32, seed=n).transpose(1, 2) for n in heads)
    cos, sin = (random(1, 2, head_dim[1], dtype=FP32, seed=seed) for seed in (7, 8))
    check(q, k, cos, sin, Form(partial=True))


def test_nothing_beside_the_tensors_is_read_or_written() -> None:
    """Views of one projection with NaN between them, tables that all rows share, gradients in another layout."""
    room = torch.full((2, 3, 4, 24), float("nan"))
    room[..., :16] = random(2, 3, 4, 16, dtype=FP32, seed=0)
    q, k = room[:, :, :3, :16].transpose(1, 2), room[:, :, 3:, :16].transpose(1, 2)
    cos, sin = (random(1, 3, 20, dtype=FP32, seed=seed)[..., :16] for seed in (7, 8))
    check(q, k, cos, sin, Form())
    assert room[..., 16:].isnan().all()
    q, k = (x.clone().requires_grad_() for x in (q, k))
    outputs = rotary.rotate(q, k, cos, sin, Form())
    upstream = [torch.randn(*x.shape[:2], 16, 3).transpose(2, 3) for x in outputs]  # the last dimension has a stride
    found = torch.autograd.grad(outputs, (q, k), upstream)
    want = torch.autograd.grad([rotary.reference(x, cos, sin, Form()) for x in (q, k)], (q, k), upstream)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_tables_with_strides_of_their_own() -> None:
    q, k = (random(2, 3, n, 16, dtype=FP32, seed=n).transpose(1, 2) for n in (3, 1))
    cos, sin = random(2, 3, 20, dtype=FP32, seed=7)[..., :16], random(3, 2, 24, dtype=FP32, seed=8)[..., :16]
    check(q, k, cos, sin.transpose(0, 1), Form())


def test_one_of_the_two_is_used() -> None:
    q, k = (random(1, 2, 3, 8, dtype=FP32, seed=seed).requires_grad_() for seed in (0, 1))
    cos, sin = (random(1, 3, 8, dtype=FP32, seed=seed) for seed in (7, 8))
    rotary.rotate(q, k, cos, sin, Form())[1].sum().backward()
    assert not q.grad.any() and k.grad.any()


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_the_two_needs_a_gradient(wanted: int) -> None:
    both = [random(1, 2, 3, 8, dtype=FP32, seed=seed) for seed in (0, 1)]
    cos, sin = (random(1, 3, 8, dtype=FP32, seed=seed) for seed in (7, 8))
    both[wanted].requires_grad_()
    upstream = random(1, 2, 3, 8, dtype=FP32, seed=2)
    (found,) = torch.autograd.grad(rotary.rotate(*both, cos, sin, Form())[wanted], both[wanted], upstream)
    (want,) = torch.autograd.grad(rotary.reference(both[wanted], cos, sin, Form()), both[wanted], upstream)
    assert torch.equal(found, want)


def test_second_derivatives_are_an_error() -> None:
    q, k = (random(1, 2, 3, 8, dtype=FP32, seed=seed).requires_grad_() for seed in (0, 1))
    cos, sin = (random(1, 3, 8, dtype=FP32, seed=seed) for seed in (7, 8))
    out = rotary.rotate(q, k, cos, sin, Form())[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
