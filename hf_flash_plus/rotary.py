"""Rotary position embedding of queries and keys, in the variants of Transformers' models, by one kernel.

(RoPE: Su et al., "RoFormer", 2021.) Models write it with torch operations and differ in which columns are pairs, in
where numbers are rounded, and in whether all columns are rotated: a :class:`Form`. :func:`find_form` tells a function's
form by what it computes, to the bit; :func:`rotate` computes it. Nothing here knows Transformers: ``integration`` finds
the functions, and asks here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Form(NamedTuple):
    """How a model rotates.

    Attributes:
        interleaved: pairs are columns (0, 1), (2, 3), ... (GPT-J); otherwise (0, d/2), (1, d/2 + 1), ... (GPT-NeoX).
        half_table: with ``interleaved``, pair i has the angle of the tables' column i.
        partial: columns beyond the tables' stay as they are; otherwise the tables are as wide as a head.
        upcast: computed in float32; otherwise in the dtype that queries and tables promote to.
        cast: the result has the queries' dtype; otherwise the computation's.
        one_gradient: gradients are summed before they are rounded to the queries' dtype, as where queries were made
            float32 once.
    """

    interleaved: bool = False
    half_table: bool = False
    partial: bool = False
    upcast: bool = False
    cast: bool = False
    one_gradient: bool = False


FORMS = tuple(
    Form(*pairs, partial, *rounding)
    for pairs, rounding, partial in itertools.product(
        ((False, False), (True, False), (True, True)),
        ((False, False, False), (False, True, False), (True, True, False), (True, True, True)),
        (False, True),
    )
)
#: Of queries and of tables.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def reference(x: Tensor, cos: Tensor, sin: Tensor, form: Form) -> Tensor:
    """``x (batch, heads, seqlen, head_dim)`` rotated by torch operations; tables as in :func:`rotate`."""
    cos, sin = cos[:, None], sin[:, None]
    if form.half_table:
        half = cos.shape[-1] // 2
        cos, sin = (table[..., :half].repeat_interleave(2, dim=-1) for table in (cos, sin))
    turned, rest = (x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]) if form.partial else (x, x[..., :0])
    if form.upcast and form.one_gradient:
        wide = turned.float()
        out = wide * cos + _turn(wide, form) * sin
    elif form.upcast:
        out = turned.float() * cos + _turn(turned.float(), form) * sin
    else:
        out = turned * cos + _turn(turned, form) * sin
    out = out.to(x.dtype) if form.cast else out
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def _turn(x: Tensor, form: Form) -> Tensor:
    """The other number of each column's pair, with the sign that it has in the sum."""
    if form.interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class _Probe(NamedTuple):
    """A small problem on the CPU that tells forms apart."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor

    def results(self, function: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Outputs and gradients, or raises what the function raises."""
        q, k = self.q.clone().requires_grad_(), self.k.clone().requires_grad_()
        outputs = function(q, k, self.cos, self.sin)
        gradients = torch.autograd.grad(outputs, (q, k), [torch.cos(3 * x.detach()) for x in outputs])
        return (*(x.detach() for x in outputs), *gradients)


def _probes() -> list[_Probe]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    found = []
    # Tables without any symmetry: nothing that a form reads can be mistaken for another.
    for rotary_dim, dtype, table in itertools.product((16, 12), (torch.float32, torch.bfloat16), _DTYPES[1:]):
        q, k = random(2, 3, 7, 16, dtype=dtype), random(2, 1, 7, 16, dtype=dtype)
        found.append(_Probe(q, k, random(2, 7, rotary_dim, dtype=table), random(2, 7, rotary_dim, dtype=table)))
    return found


def find_form(function: Callable[..., Any]) -> Form | None:
    """The form of ``function(q, k, cos, sin) -> (q, k)``; None where it computes something else.

    Outputs and gradients are compared bit by bit on small random tensors, on the CPU, in float32 and bfloat16. What a
    function refuses, its form has to refuse.
    """
    candidates = list(FORMS)
    with torch.inference_mode(False), torch.enable_grad():
        for probe in _probes():
            expected = _try(probe, function)
            candidates = [form for form in candidates if _same(_try(probe, _by(form)), expected)]
            if not candidates:
                return None
    return candidates[0]


def _by(form: Form) -> Callable[..., Any]:
    return lambda q, k, cos, sin: (reference(q, cos, sin, form), reference(k, cos, sin, form))


def _try(probe: _Probe, function: Callable[..., Any]) -> tuple[Tensor, ...] | None:
    try:
        return probe.results(function)
    except Exception:  # whatever a function does with what it does not take
        return None


def _same(a: tuple[Tensor, ...] | None, b: tuple[Tensor, ...] | None) -> bool:
    if a is None or b is None:
        return a is b
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b))


def serves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> bool:
    """Whether :func:`rotate` computes a call, by its shapes, strides and dtypes; whether kernels run on its device is
    to be asked apart (``TritonProvider.runs_on``).

    Everything else (shapes that do not fit, other dtypes, gradients of the tables, tensors of subclasses) is the
    model's own function's.
    """
    if not type(q) is type(k) is type(cos) is type(sin) is Tensor or q.dim() != 4 or k.dim() != 4 or cos.dim() != 3:
        return False
    batch, _, seqlen, head_dim = q.shape
    rotary_dim = cos.shape[2]
    return (
        k.shape[0] == batch
        and k.shape[2:] == q.shape[2:]
        and cos.shape == sin.shape
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == seqlen
        and (rotary_dim <= head_dim if form.partial else rotary_dim == head_dim)
        and rotary_dim % 2 == 0
        and 0 not in (rotary_dim, q.numel(), k.numel())
        and q.stride(3) == k.stride(3) == cos.stride(2) == sin.stride(2) == 1
        and k.dtype == q.dtype in _DTYPES
        and sin.dtype == cos.dtype in _DTYPES
        and q.device == k.device == cos.device == sin.device
        and not cos.requires_grad
        and not sin.requires_grad
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated, the bits of the model's own function; differentiable in ``q`` and ``k``.

    Args:
        q: ``(batch, nheads, seqlen, head_dim)``, fp16, bf16 or fp32, the last dimension contiguous.
        k: ``(batch, nheads_k, seqlen, head_dim)``, as ``q``.
        cos, sin: ``(batch or 1, seqlen, rotary_dim)``.
        form: how.

    Returns:
        New tensors of the shapes of ``q`` and ``k``; of their dtype with ``form.cast`` and where the tables have it,
        otherwise float32, as torch promotes. Only for calls that :func:`serves` names.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        result: tuple[Tensor, Tensor] = _Rotate.apply(q, k, cos, sin, form)
        return result
    q_out, k_out, ticket = _forward(q, k, cos, sin, form)
    if ticket is not None:
        _last[form] = ticket
    return q_out, k_out


#: By form, what can repeat the last call that no gradient was asked of.
_last: dict[Form, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor] | None]] = {}


def recall(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor] | None:
    """What :func:`rotate` returns, where the last call was like this one but for its data and no gradient is asked for;
    None else. Takes tensors only, of any kind."""
    ticket = _last.get(form)
    if (
        ticket is None
        or not type(q) is type(k) is type(cos) is type(sin) is Tensor
        or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or cos.requires_grad or sin.requires_grad))
    ):
        return None
    return ticket(q, k, cos, sin)


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor, Any]:
    in_half = not form.upcast and cos.dtype == q.dtype
    # Products of float32 numbers are rounded as they are.
    return _launch(q, k, cos, sin, form, q.dtype if form.cast or in_half else torch.float32, in_half, backward=False)


def _launch(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form, dtype: torch.dtype, rounded: bool, backward: bool
) -> tuple[Tensor, Tensor, Any]:
    from .kernels import rotary, tiles

    rotation = rotary.Rotation(
        tiles.device_info(q.device), q.shape[3], cos.shape[2], form.interleaved, form.half_table, rounded, backward
    )
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        # Triton launches on the current device. In backward, autograd's threads have made it the tensors': what is
        # recomputed there has to take the way that it took in forward.
        with torch.cuda.device(q.device):
            return rotary.rotate(q, k, cos, sin, rotation, dtype)
    return rotary.rotate(q, k, cos, sin, rotation, dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.form, ctx.dtype = form, q.dtype
        return _forward(q, k, cos, sin, form)[:2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q_grad, k_grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_grad, k_grad))
        rounded = not ctx.form.one_gradient
        gradients = _launch(q_grad, k_grad, cos, sin, ctx.form, ctx.dtype, rounded, backward=True)
        return (*gradients[:2], None, None, None)
