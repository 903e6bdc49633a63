"""One attention call as data: :class:`AttentionInputs`, its :class:`CallSignature`, and all validation.

Every ``ValueError`` or ``TypeError`` about shapes, dtypes and devices is raised here, by one function, so that no
malformed call reaches a kernel. Each message names the argument, what came, and what is allowed.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .masks import FULL, AttentionMask

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Up to this many query rows a call counts as decoding (one token, or the draft of assisted generation).
SHORT_QUERY = 16

#: The kernels' offsets inside a tile are 32 bits wide: 512 rows this far apart still fit. Tensors beyond are copied.
MAX_ROW_STRIDE = 2**31 // 512


#: A dimension of a CUDA grid but its first one ends here: kernels that put the batch or the heads there end with it.
MAX_GRID = 65535


class CallSignature(NamedTuple):
    """What decides which provider can serve a call: everything but the data and the sequence lengths.

    Of the batch nothing is said but where it is larger than a CUDA grid: ``oversized`` is then the number of batch
    elements, or of packed sequences; else 0.
    """

    device_type: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    nheads: int
    nheads_k: int
    short_query: bool
    causal: bool
    window: bool
    intervals: bool
    packed: bool
    key_mask: bool
    bias: str  # "none", "bool" or "float"
    bias_grad: bool
    alibi: bool
    sinks: str  # "none", "head" (nheads,) or "row" (batch, nheads, seqlen_q)
    softcap: bool
    dropout: bool
    needs_grad: bool
    needs_lse: bool
    deterministic: bool
    oversized: int = 0


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """One attention call.

    Attributes:
        query: ``(batch, seqlen_q, nheads, head_dim)``, last dimension contiguous, other strides free.
        key: ``(batch, seqlen_k, nheads_k, head_dim)``; ``nheads`` is a multiple of ``nheads_k``.
        value: ``(batch, seqlen_k, nheads_k, v_head_dim)``.
        softmax_scale: factor on the scores, before everything else.
        mask: what each row sees.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0 is off.
        alibi_slopes: fp32 ``(nheads,)`` or ``(batch, nheads)``: ``-slope * |diagonal - j|`` is added to scores.
        sinks: ``(nheads,)`` or ``(batch, nheads, seqlen_q)``: one more logit in each row's softmax, with no value.
        dropout_p: probability of dropping an attention weight.
        dropout_seed: int64 ``(1,)`` on the device, drawn from torch's generator; set by ``ops`` for the kernels
            that make their own random numbers.
        deterministic: only bitwise repeatable backward passes may serve.
        needs_lse: the caller wants ``softmax_lse``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    # Not a plain default: Dynamo of torch 2.11 cannot trace a dataclass with an object as a class attribute.
    mask: AttentionMask = field(default_factory=lambda: FULL)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    deterministic: bool = False
    needs_lse: bool = False

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.query.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.key.shape[1]

    @property
    def nheads(self) -> int:
        return self.query.shape[2]

    @property
    def nheads_k(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def v_head_dim(self) -> int:
        return self.value.shape[3]

    def signature(self) -> CallSignature:
        """The call without its data and lengths: the key under which a provider is chosen."""
        mask, bias, sinks = self.mask, self.mask.bias, self.sinks
        grad = torch.is_grad_enabled()
        bias_grad = grad and bias is not None and bias.requires_grad
        needs_grad = grad and (
            self.query.requires_grad
            or self.key.requires_grad
            or self.value.requires_grad
            or bias_grad
            or (sinks is not None and sinks.requires_grad)
        )
        compiling = torch.compiler.is_compiling()
        batch, seqlen_q, nheads, head_dim = self.query.shape
        _, _, nheads_k, v_head_dim = self.value.shape
        if mask.packed is not None:
            batch = mask.packed.cu_seqlens_q.shape[0] - 1
        if compiling or not type(nheads) is type(head_dim) is type(nheads_k) is type(v_head_dim) is int:
            nheads, head_dim, nheads_k, v_head_dim = map(_constant, (nheads, head_dim, nheads_k, v_head_dim))
        return CallSignature(
            self.query.device.type,
            self.query.dtype,
            head_dim,
            v_head_dim,
            nheads,
            nheads_k,
            # Reading a symbolic length would make torch.compile, or make_fx, specialise on it.
            not compiling and type(seqlen_q) is int and seqlen_q <= SHORT_QUERY,
            mask.causal,
            mask.windowed,
            mask.row_intervals is not None,
            mask.packed is not None,
            mask.key_mask is not None,
            "none" if bias is None else "bool" if bias.dtype == torch.bool else "float",
            bias_grad,
            self.alibi_slopes is not None,
            "none" if sinks is None else "head" if sinks.dim() == 1 else "row",
            # `... if ... else ...` decides here where torch.compile(dynamic=True) has made the number symbolic.
            True if self.softcap > 0.0 else False,  # noqa: SIM210
            True if self.dropout_p > 0.0 else False,  # noqa: SIM210
            needs_grad,
            self.needs_lse,
            self.deterministic,
            _constant(batch) if batch > MAX_GRID else 0,
        )


def _constant(size: int) -> int:
    """A size that kernels are compiled for: ``torch.compile(dynamic=True)`` and ``make_fx`` with symbolic sizes take it
    for a constant by this."""
    return len(range(size))


def integer(value: Any) -> Any:
    """A number of another library (``numpy.int64``) as an int; anything else as it came, to be judged by the checks."""
    if isinstance(value, (int, Tensor)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def real(value: Any) -> Any:
    """A number of another library (``numpy.float32``) as a float; anything else as it came."""
    return float(value) if not isinstance(value, (int, float)) and isinstance(value, numbers.Real) else value


def describe(tensor: Tensor) -> str:
    """A tensor in an error message: ``torch.float16 (2, 3, 4) on cuda:0``."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise ValueError unless ``condition``; the message may be a function, so that only errors pay for making it."""
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def _require_tensor(name: str, value: object, optional: bool = False) -> None:
    if not (isinstance(value, Tensor) or (optional and value is None)):
        raise TypeError(f"{name} must be a torch.Tensor{' or None' if optional else ''}, got {type(value).__name__}.")


def require_strided(name: str, tensor: object) -> None:
    """Raise ValueError for nested and sparse tensors, whose shapes and strides are not what they seem."""
    if not isinstance(tensor, Tensor):
        return
    _require(
        not tensor.is_nested,
        f"{name} is a nested tensor; pass its values and offsets to flash_attn_varlen_func, or pad it.",
    )
    _require(
        tensor.layout == torch.strided,
        lambda: f"{name} is a {tensor.layout} tensor; only dense tensors are served: {name}.to_dense().",
    )


#: How many modes are active that see each of torch's operations: who traces, who counts (a torch that does not say: 1).
dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, or breaking a graph that is being traced."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and dispatch_modes() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _require_values(name: str, values: Tensor, low: int, high: int, why: str) -> None:
    """Raise ValueError unless all numbers are in ``[low, high]``, where they are :func:`readable`. (On a GPU an index
    out of range ends at torch's own device-side assertion, as in any indexing.)"""
    if not readable(values) or not values.numel():
        return
    least, most = int(values.min()), int(values.max())
    _require(
        low <= least and most <= high, lambda: f"{name} must be from {low} to {high} ({why}), got {least} to {most}."
    )


def _layout(tensor: object) -> object:
    """All that validation reads of a tensor."""
    if not isinstance(tensor, Tensor):
        return object()  # never equal to what was found valid
    return tensor.shape, tensor.dtype, tensor.device


_valid: set[object] = set()


def validate(inputs: AttentionInputs) -> None:
    """Check one call, argument by argument; calls that differ only in their data are checked once.

    Raises:
        TypeError: a tensor argument is no tensor.
        ValueError: a shape, dtype, device or number is not allowed; says which, what came, what is allowed.
    """
    q, k, v, mask, sinks = inputs.query, inputs.key, inputs.value, inputs.mask, inputs.sinks
    if torch.compiler.is_compiling() or inputs.alibi_slopes is not None:
        _validate(inputs)
        return
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        _validate(inputs)
        return
    # Written out, not looped: this runs on every call.
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        k.dtype,
        v.dtype,
        q.device,
        k.device,
        v.device,
        None if mask.row_intervals is None else _layout(mask.row_intervals),
        None if mask.key_mask is None else _layout(mask.key_mask),
        None if mask.key_holes is None else _layout(mask.key_holes),
        None if mask.row_positions is None else _layout(mask.row_positions),
        None if mask.bias is None else _layout(mask.bias),
        None if sinks is None else _layout(sinks),
        mask.packed is None,
        None if mask.window == (-1, -1) else repr(mask.window),  # (2.0, 1.0) equals (2, 1), but is no window
        inputs.softmax_scale,
        inputs.softcap,
        inputs.dropout_p,
    )
    try:
        if key in _valid:
            return
    except TypeError:  # something unhashable where a number belongs: let the checks say so
        _validate(inputs)
        return
    _validate(inputs)
    if len(_valid) > 4096:  # lengths that grow token by token would fill memory
        _valid.clear()
    _valid.add(key)


def _validate(inputs: AttentionInputs) -> None:
    q, k, v = inputs.query, inputs.key, inputs.value
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, tensor)
        require_strided(name, tensor)
        _require(
            tensor.dim() == 4,
            lambda: f"{name} must have 4 dimensions (batch, seqlen, nheads, headdim), got {describe(tensor)}.",
        )
    _require(
        q.dtype in DTYPES,
        lambda: f"q has dtype {q.dtype}; supported are {', '.join(map(str, DTYPES))}. Cast with q.to(torch.bfloat16).",
    )
    for name, tensor in (("k", k), ("v", v)):
        _require(
            tensor.dtype == q.dtype,
            lambda: (
                f"q, k and v must have one dtype: q is {q.dtype}, {name} is {tensor.dtype}. "
                f"Cast {name} with .to({q.dtype}), or run under torch.autocast."
            ),
        )
        _require(
            tensor.device == q.device,
            lambda: f"{name} is on {tensor.device}, but q is on {q.device}; move one of them.",
        )
        _require(
            tensor.shape[0] == q.shape[0],
            lambda: (
                f"{name} has batch {tensor.shape[0]}, but q has batch {q.shape[0]} "
                f"(q: {describe(q)}, {name}: {describe(tensor)})."
            ),
        )
    _require(
        k.shape[1:3] == v.shape[1:3],
        lambda: f"k and v must have the same seqlen and nheads, got k: {describe(k)}, v: {describe(v)}.",
    )
    _require(k.shape[3] == q.shape[3], lambda: f"k has headdim {k.shape[3]}, but q has headdim {q.shape[3]}.")
    _require(
        q.shape[3] > 0 and v.shape[3] > 0, lambda: f"headdim must be positive, got q: {describe(q)}, v: {describe(v)}."
    )
    _require(
        q.shape[2] > 0 and k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0,
        lambda: f"the number of heads of q ({q.shape[2]}) must be a multiple of that of k and v ({k.shape[2]}).",
    )
    _validate_numbers(inputs)
    _validate_mask(inputs)
    batch, nheads = q.shape[0], q.shape[2]
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes
        _require_tensor("alibi_slopes", slopes)
        _require(
            slopes.dtype == torch.float32 and _has_shape(slopes, (nheads,), (batch, nheads)),
            lambda: (
                f"alibi_slopes must be torch.float32 of shape ({nheads},) or ({batch}, {nheads}), "
                f"got {describe(slopes)}."
            ),
        )
        _require(slopes.device == q.device, lambda: f"alibi_slopes is on {slopes.device}, but q is on {q.device}.")
        _require(
            not slopes.requires_grad,
            "alibi_slopes requires a gradient, which is not computed; pass the bias as a dense bias to train it.",
        )
    if inputs.sinks is not None:
        sinks = inputs.sinks
        _require_tensor("s_aux", sinks)
        _require(
            sinks.is_floating_point() and _has_shape(sinks, (nheads,), (batch, nheads, q.shape[1])),
            lambda: (
                f"s_aux (attention sinks) must be floating, of shape ({nheads},) or ({batch}, {nheads}, {q.shape[1]}), "
                f"got {describe(sinks)}."
            ),
        )
        _require(sinks.device == q.device, lambda: f"s_aux is on {sinks.device}, but q is on {q.device}.")


def _has_shape(tensor: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether a tensor has one of these shapes. (Sizes are compared one by one: see :func:`_validate_mask`.)"""
    return any(
        tensor.dim() == len(shape) and all(n == size for n, size in zip(tensor.shape, shape)) for shape in shapes
    )


#: Sizes of numbers, but for 0, that kernels can compute with in fp32.
_LEAST, _MOST = 1e-30, 1e30


def _validate_numbers(inputs: AttentionInputs) -> None:
    scale, softcap = inputs.softmax_scale, inputs.softcap
    _require(
        isinstance(scale, (int, float)) and -math.inf < scale < math.inf,
        lambda: f"softmax_scale must be a finite number, got {scale!r}.",
    )
    _require(
        isinstance(softcap, (int, float)) and 0.0 <= softcap < math.inf,
        lambda: f"softcap must be a finite number >= 0 (0 is off), got {softcap!r}.",
    )
    for name, number in (("softmax_scale", scale), ("softcap", softcap)):
        _require(
            number == 0.0 or _LEAST <= abs(number) <= _MOST,
            lambda: f"{name} must be 0 or of a size from {_LEAST} to {_MOST} (computed in fp32), got {number!r}.",
        )
    _require(
        isinstance(inputs.dropout_p, (int, float)) and 0.0 <= inputs.dropout_p < 1.0,
        lambda: f"dropout_p must be in [0, 1), got {inputs.dropout_p!r}.",
    )


def require_window(window: Sequence[int]) -> None:
    """Raise ValueError for a side of a window that is neither unlimited (-1) nor a number of keys."""
    _require(
        min(window) >= -1, lambda: f"window_size must be >= -1 on both sides (-1 is unlimited), got {tuple(window)!r}."
    )


def _validate_mask(inputs: AttentionInputs) -> None:
    mask, q = inputs.mask, inputs.query
    batch, seqlen_q, nheads, seqlen_k = q.shape[0], q.shape[1], q.shape[2], inputs.key.shape[1]
    _require(
        isinstance(mask.window, tuple) and len(mask.window) == 2 and all(isinstance(w, int) for w in mask.window),
        lambda: (
            f"window_size must be a tuple of two integers (left, right), -1 meaning unlimited, got {mask.window!r}."
        ),
    )
    require_window(mask.window)
    expected = (
        ("row_intervals", mask.row_intervals, (torch.int32,), ((batch, 1), (seqlen_q,), (2,))),
        ("key_mask", mask.key_mask, (torch.bool,), ((batch, 1), (seqlen_k,))),
        ("key_holes", mask.key_holes, (torch.int32,), ((batch, 1),)),
        ("row_positions", mask.row_positions, (torch.int32,), ((batch, 1), (seqlen_q,))),
        ("bias", mask.bias, (torch.bool, *DTYPES), ((batch, 1), (nheads, 1), (seqlen_q, 1), (seqlen_k,))),
    )
    for name, tensor, dtypes, sizes in expected:
        if tensor is None:
            continue
        _require_tensor(name, tensor)
        # Compared one by one: torch.compile cannot look for a symbolic length in a tuple.
        _require(
            tensor.dtype in dtypes
            and tensor.dim() == len(sizes)
            and all(any(n == allowed for allowed in size) for n, size in zip(tensor.shape, sizes)),
            lambda: (
                f"{name} must be {' or '.join(map(str, dtypes))} of shape {_one_of(sizes)}, got {describe(tensor)}."
            ),
        )
        _require(tensor.device == q.device, lambda: f"{name} is on {tensor.device}, but q is on {q.device}.")
    _require(
        mask.key_holes is None or mask.key_mask is not None,
        "key_holes was given without the key_mask it describes.",
    )
    _require(
        mask.packed is None or mask.row_intervals is not None,
        "packed was given without the row_intervals that it tells a second way, and by itself hides nothing; give both "
        "(hf_flash_plus.masks.varlen_mask makes row_intervals), or call flash_attn_varlen_func.",
    )


def _one_of(sizes: Sequence[tuple[int, ...]]) -> str:
    """A shape whose every dimension has one of several sizes, for messages: ``(2 or 1, 5)``."""
    return "(" + ", ".join(" or ".join(dict.fromkeys(map(str, size))) for size in sizes) + ")"
