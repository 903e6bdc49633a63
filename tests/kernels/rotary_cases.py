"""Rotary embeddings for the kernel tests: a call by the kernel beside the same by torch's operations, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_flash_plus import rotary
from hf_flash_plus.rotary import Form


def names(value: object) -> str:
    """Short names of forms and dtypes for pytest."""
    return "".join(str(int(x)) for x in value) if isinstance(value, Form) else str(value).replace("torch.", "")


def results(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [torch.cos(3 * x.detach()) for x in outputs])
    return (*(x.detach() for x in outputs), *gradients)


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> None:
    """Outputs, with gradients asked for and without, and gradients, of the dtypes and the bits of torch's."""
    assert rotary.serves(q, k, cos, sin, form)
    want = results(lambda q, k: (rotary.reference(q, cos, sin, form), rotary.reference(k, cos, sin, form)), q, k)
    found = results(lambda q, k: rotary.rotate(q, k, cos, sin, form), q, k)
    with torch.no_grad():
        plain = rotary.rotate(q, k, cos, sin, form)
    for one, other in zip((*found, *plain), (*want, *want[:2])):
        assert one.dtype == other.dtype and torch.equal(one, other)
