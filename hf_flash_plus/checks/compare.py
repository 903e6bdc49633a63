"""One cell: a provider's answer to one call, judged against float64."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import interface
from ..dispatch import use_provider
from . import oracle
from .features import FEATURES, Feature

#: What a cell can come to; the first two are good.
OK, REFUSED, WRONG, ERROR, CRASH, HANG = "ok", "refused", "wrong", "error", "crash", "hang"
BAD = (WRONG, ERROR, CRASH, HANG)

DROPOUT = "dropout"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Beside a multiple of eager's error: relative to one plus the largest number of what is compared.
_TINY = {torch.float64: 1e-9, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@dataclass
class Row:
    """The outcome of one cell.

    Attributes:
        error: the largest error as a part of what is allowed (above 1 is wrong); None where nothing was compared.
        note: why, for everything but ``ok``.
    """

    provider: str
    feature: str
    dtype: str
    status: str
    error: float | None = None
    note: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Difference(Exception):
    """An answer that is wrong, and how."""


def excess(
    name: str,
    got: Tensor,
    exact: Tensor,
    eager: Tensor | None,
    times: float,
    logits: float = 0.0,
    dtype: torch.dtype | None = None,
    extra: float = 1.0,
    more: float = 0.0,
) -> float:
    """The largest error as a part of what is allowed: ``times`` eager's own, and a little.

    Args:
        logits: magnitude of the log-sum-exp. Whoever keeps that in fp32 and takes its exponential again, as every
            flash attention does in backward, has weights no more precise than its last bit.
        dtype: the dtype of the call, where what is compared has another (fp32 sinks beside half-precision q).
        extra: multiplies what is allowed.
        more: added to what is allowed, for a reason of the caller's.

    Raises:
        Difference: another shape, NaN or infinity where there is none, or a part above 1.
    """
    if got.shape != exact.shape:
        raise Difference(f"{name} has shape {tuple(got.shape)} instead of {tuple(exact.shape)}")
    if not got.numel():
        return 0.0
    wide = got.detach().double()
    finite = exact.isfinite()
    if not torch.equal(wide.isfinite(), finite) or not torch.equal(wide[~finite], exact[~finite]):
        bad = (wide.isfinite() != finite).sum().item()
        raise Difference(f"{name} has NaN or infinity in {bad} places where it must not (or not where it must)")
    wide, true = wide[finite], exact[finite]
    if not true.numel():
        return 0.0
    own = 0.0 if eager is None else (eager.detach().double()[finite] - true).abs().nan_to_num(0.0).max().item()
    little = max(_TINY[dtype or got.dtype], _TINY[got.dtype]) + (
        0.0 if got.dtype == torch.float64 else logits * 2.0**-22
    )
    allowed = extra * (times * own + little * (1.0 + true.abs().max().item())) + more
    part = (wide - true).abs().max().item() / allowed
    if part > 1.0:
        raise Difference(f"{name}: error {part * allowed:.2g}, allowed {allowed:.2g}")
    return part


def judge(
    got: oracle.Answer | Tensor,
    call: oracle.Dense,
    dout: Tensor | None,
    grads: dict[str, Tensor] | None,
    extra: float = 1.0,
) -> float:
    """Compare an answer, and gradients where there are any, with float64; the worst part of what is allowed.

    Args:
        call: what was asked, in the dtype in which it was asked.
        dout: gradient of the output; ``grads`` holds the gradients of :meth:`~.oracle.Dense.leaves` by name.
        extra: multiplies what is allowed.
    """
    device = call.q.device
    exact_call = call.to(device, torch.float64, gradients=grads is not None)
    eager_call = call.to(device, call.q.dtype, gradients=grads is not None)
    exact, eager = oracle.attention(exact_call), oracle.attention(eager_call)
    out, lse = (got.out, got.lse) if isinstance(got, oracle.Answer) else (got, None)
    if out.dtype != call.q.dtype:
        raise Difference(f"out is {out.dtype} instead of {call.q.dtype}")
    seen = exact.lse[exact.lse.isfinite()]
    logits = seen.abs().max().item() if seen.numel() else 0.0
    worst = excess("out", out, exact.out.detach(), eager.out, 2, logits, extra=extra)
    if lse is not None:
        if lse.dtype != torch.float32:
            raise Difference(f"softmax_lse is {lse.dtype} instead of torch.float32")
        worst = max(worst, excess("softmax_lse", lse, exact.lse.detach(), eager.lse, 2, logits, extra=extra))
    if grads is not None and dout is not None:
        true = _gradients(exact.out, exact_call, dout.double())
        budget = _gradients(eager.out, eager_call, dout)
        more = _rounded_output(exact.out.detach(), dout, exact_call)
        for name, got_grad in grads.items():
            worst = max(
                worst, excess(f"d{name}", got_grad, true[name], budget[name], 3, logits, out.dtype, extra, more)
            )
    return worst


def _rounded_output(out: Tensor, dout: Tensor, call: oracle.Dense) -> float:
    """What gradients may lose because flash attention takes ``sum(dout * out)`` from the output that it had rounded.

    Eager attention, which keeps all weights, does not: where weights are nearly 0 or 1 its error is no measure.
    """
    if dout.dtype == torch.float64 or not out.numel() or not call.k.numel():
        return 0.0
    delta = (dout.double() * out).abs().sum(-1).max().item() * torch.finfo(dout.dtype).eps / 2
    scale = abs(call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    return delta * max(1.0, scale * max(call.q.abs().max().item(), call.k.nan_to_num().abs().max().item()))


def _gradients(out: Tensor, call: oracle.Dense, dout: Tensor) -> dict[str, Tensor]:
    leaves = call.leaves()
    found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found)}


def _compare(feature: Feature, provider: str, dtype: torch.dtype, device: torch.device) -> float:
    torch.manual_seed(0)
    made = feature.make()
    dout = torch.randn(*made.q.shape[:3], made.v.shape[3]).to(device, dtype)
    call = made.to(device, dtype, gradients=feature.gradients)
    grads = None
    with use_provider(provider), torch.set_grad_enabled(feature.gradients):
        got = feature.ask(call)
        if feature.gradients:
            out = got.out if isinstance(got, oracle.Answer) else got
            grads = _gradients(out, call, dout)
    return judge(got, call, dout, grads)


def _dropout(provider: str, dtype: torch.dtype, device: torch.device) -> float:
    """Dropout by what it promises: the share, the mean, one mask in forward and backward, obedience to the seed.

    With q = 0 all weights are 1/n, and with v the unit matrix the output is the matrix of weights itself.
    """
    batch, rows, heads, n, p = 2, 160, 4, 64, 0.25
    q = torch.zeros(batch, rows, heads, n, device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, n, heads, n, device=device).to(dtype)
    v = torch.eye(n, device=device, dtype=dtype)[None, :, None].repeat(batch, 1, heads, 1).requires_grad_()

    def attend(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with use_provider(provider):
            out: Tensor = interface.flash_attn_func(q, k, v, dropout_p=p)
        return out

    weights = attend(1)
    (dv,) = torch.autograd.grad(weights.float().sum(), v)
    kept = weights != 0
    total = kept.numel()
    # Six standard deviations of so many coins: a false alarm comes once in 10^9 checks.
    share_error = abs(kept.double().mean().item() - (1 - p)) / (6 * (p * (1 - p) / total) ** 0.5)
    if share_error > 1.0:
        raise Difference(f"dropout_p={p} kept {kept.double().mean().item():.4f} of {total} weights")
    value = weights.detach()[kept].double()
    scale_error = (value * n * (1 - p) - 1).abs().max().item() / (8 * torch.finfo(dtype).eps + 1e-4)
    if scale_error > 1.0:
        raise Difference("weights that are kept are not scaled by 1 / (1 - dropout_p)")
    # Each row of dv sums the weights of its key: over the head dim, all of them equal.
    by_key = weights.detach().double().sum(1).transpose(1, 2)  # (batch, key, heads)
    backward_error = (dv.double()[..., 0] - by_key).abs().max().item() / (0.02 * by_key.abs().max().item())
    if backward_error > 1.0:
        raise Difference("the backward drops other weights than the forward")
    if not torch.equal(attend(1), weights):
        raise Difference("the same torch.manual_seed gives another mask")
    if torch.equal(attend(2) != 0, kept):
        raise Difference("another torch.manual_seed gives the same mask")
    heads_differ = not torch.equal(kept[0, :, 0], kept[0, :, 1]) and not torch.equal(kept[0], kept[1])
    if not heads_differ:
        raise Difference("heads or batch elements share one mask")
    return max(share_error, scale_error, backward_error)


def names() -> list[str]:
    """The features, in order."""
    return [feature.name for feature in FEATURES] + [DROPOUT]


def run_cell(provider: str, feature: str, dtype: str, device: str) -> Row:
    """One cell of the matrix; nothing is raised."""
    begin = time.perf_counter()
    row = Row(provider, feature, dtype, OK)
    where = torch.device(device)
    devices = [where] if where.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            if feature == DROPOUT:
                row.error = _dropout(provider, DTYPES[dtype], where)
            else:
                found = next(one for one in FEATURES if one.name == feature)
                row.error = _compare(found, provider, DTYPES[dtype], where)
    except Difference as error:
        row.status, row.note = WRONG, str(error)
    except NotImplementedError as error:  # NoProviderError, and what a provider refuses by lengths
        row.status, row.note = REFUSED, _reasons(str(error))
    except Exception as error:
        row.status, row.note = ERROR, f"{type(error).__name__}: {_first_line(error)}"
    row.seconds = round(time.perf_counter() - begin, 3)
    return row


def _reasons(message: str) -> str:
    """The reasons out of a NoProviderError's text: without the call, the provider's name, and the hint at the end."""
    lines = [line.strip() for line in message.splitlines()]
    reasons = [line.partition(": ")[2] for line in lines[1:] if line and not line.startswith("`")]
    return "; ".join(reasons) or lines[0]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
