"""Executing a random call, and comparing what it gives with float64, on the device that it ran on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_flash_plus.checks.compare import Difference, excess, judge
from hf_flash_plus.checks.oracle import Answer
from hf_flash_plus.dispatch import NoProviderError

from .cached import Cached
from .calls import Call, Varlen


class Declined(Exception):
    """The provider says that it does not serve the call."""


class DeviceLost(BaseException):
    """The call took the device with it. No ``Exception``: hypothesis would go on, and shrink what no longer runs."""


def run(call: Call, provider: str, device: str) -> None:
    """Execute a call and compare output, log-sum-exp, gradients and caches with float64.

    Raises:
        Declined: the provider does not serve it.
        DeviceLost: after it the device answers nobody in this process.
        AssertionError: something differs or fails; shows code that reproduces it.
    """
    code = call.code(provider, device)
    try:
        _run(call, code, device)
    except Declined:
        raise
    except Exception as error:
        what = str(error) if isinstance(error, Difference) else f"{type(error).__name__}: {error}"
        what = f"{what}\n\n# This reproduces the call:\n{code}"
        raise (AssertionError if _answers(device) else DeviceLost)(what) from error


def _answers(device: str) -> bool:
    try:
        return torch.ones(1, device=device).item() == 1.0
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def _run(call: Call, code: str, device: str) -> None:
    names: dict[str, Any] = {}
    try:
        exec(compile(code, "<random call>", "exec"), names)
    except NoProviderError as error:
        raise Declined(str(error)) from None
    out, lse = _parts(call, names["result"])
    dense = call.dense(names).to(device, gradients=bool(call.sources()))
    grads = dout = None
    if call.sources():
        generator = torch.Generator().manual_seed(call.seed + 1)
        dout = torch.randn(out.shape, generator=generator).to(device, out.dtype)
        if not out.requires_grad:
            raise Difference("the output has no gradient although its inputs do")
        grads = _gradients(call, names, out, dout)
    out, lse = out.detach(), None if lse is None else lse.detach()
    if isinstance(call, Varlen):
        out, lse = out[None], None if lse is None else lse[None]
        dout = None if dout is None else dout[None]
    # Eager's own error is a poor measure where it is drawn from a handful of numbers: by luck it may be next to none.
    extra = 3.0 if out.dtype in (torch.float16, torch.bfloat16) else 1.0
    judge(out if lse is None else Answer(out, lse), dense, dout, grads, extra)
    if isinstance(call, Cached):
        for name, got, want in zip(("k_cache", "v_cache"), (names["k_cache"], names["v_cache"]), call.after(names)):
            # Rotation is rounded to the dtype once; everything else must be there to the bit.
            excess(name, got.cpu(), want, None, 1)
            if name == "v_cache" and not torch.equal(got.cpu().double(), want):
                raise Difference("v_cache holds other values than were appended")


def _parts(call: Call, result: Any) -> tuple[Tensor, Tensor | None]:
    return (result[0], result[1]) if isinstance(result, tuple) else (result, None)


def _gradients(call: Call, names: dict[str, Any], out: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Gradients by the names of :class:`Dense`."""
    wanted = [names[name] for name in call.sources()]
    found = torch.autograd.grad(out, wanted, dout, allow_unused=True)
    grads = {}
    for name, source, gradient in zip(call.sources(), wanted, found):
        gradient = torch.zeros_like(source) if gradient is None else gradient
        if gradient.dtype != source.dtype or gradient.shape != source.shape:
            raise Difference(f"the gradient of {name} is {gradient.dtype} {tuple(gradient.shape)}")
        grads |= call.taken_apart(name, gradient)
    return grads


def check(call: Call, providers: tuple[str, ...], device: str) -> int:
    """:func:`run` with several providers; how many of them served."""
    served = 0
    for provider in providers:
        try:
            run(call, provider, device)
        except Declined:
            continue
        served += 1
    return served
