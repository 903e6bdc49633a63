"""The provider ``flaggems``: FlagGems' Triton attention, at the entry points and in the cases verified right.

This is the only module that imports flag_gems, and only when a call on its device asks for it: the import takes
seconds, raises where no device is visible, and opens an sqlite database. FlagGems computes forwards; gradients come
from our Triton kernels, from the same log-sum-exp.

What FlagGems does with its arguments was checked version by version (:data:`VERIFIED`, :data:`KNOWN_BAD`); a version
that nobody checked is declined.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import threading
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import AttentionInputs, CallSignature
from ..masks import with_intervals
from .base import AttentionGradients, AttentionOutput, Provider
from .toolchain import missing_tool

logger = logging.getLogger("hf_flash_plus")

DISTRIBUTION = "flag_gems"

#: Versions of flag_gems whose two entry points below were compared with float64, and on what.
VERIFIED = {"5.0.2": "NVIDIA H200, torch 2.11, Triton 3.6"}

#: FlagGems 5.0.2's varlen kernel uses block pointers (``tl.make_block_ptr``), which Triton removed in this version.
TRITON_WITHOUT_BLOCK_POINTERS = (3, 9)

#: Most sequences of one varlen call (the second dimension of a CUDA grid), and most entries of one page table.
MAX_SEQUENCES = 65535
MAX_TABLE = 2**26

#: Rows of one block of FlagGems' dense kernel, in each of its configurations.
BLOCK_ROWS = 128


#: The architectures with a row of their own in ``kernels/tiles.py``.
TUNED_ARCHITECTURES = frozenset({"sm80", "sm90", "sm100", "gfx90a", "gfx942"})


class KnownBad(NamedTuple):
    """Something in flag_gems that must not be used: where, in which versions, and what it does."""

    entry_point: str
    versions: tuple[str, ...]
    reason: str


KNOWN_BAD = (
    KnownBad(
        "flash_attention_forward(disable_splitkv=False), its default",
        ("5.0.2",),
        "garbage (relative error 5 to 26, NaN) wherever it splits the keys, that is for few batches x heads",
    ),
    KnownBad(
        "flash_attention_forward, causal or window, more than 128 query rows that are no multiple of 128",
        ("5.0.2",),
        "leaves out keys on the right of the block diagonal (relative error up to 0.6 with 385 rows); "
        "such calls go to flash_attn_varlen_func",
    ),
    KnownBad(
        "flash_attention_forward, window with one side unlimited (-1)",
        ("5.0.2",),
        "ignores the window; the unlimited side is passed as a number here",
    ),
    KnownBad(
        "flash_attention_forward, softmax_scale 0 or negative",
        ("5.0.2",),
        "takes 0 for the default and overflows below 0; the sign is moved into the query here",
    ),
    KnownBad(
        "flash_attention_forward, values with other strides than the keys",
        ("5.0.2",),
        "reads the values with the strides of the keys; such values are copied here",
    ),
    KnownBad(
        "flash_attn_varlen_func, all sequences of one query, fewer key than query heads",
        ("5.0.2",),
        "returns the log-sum-exp in the wrong order; called as for sequences of up to two queries here",
    ),
    KnownBad("flash_attn_varlen_func(s_aux=...)", ("5.0.2",), "ignores the attention sinks"),
    KnownBad(
        "alibi_slopes with causal",
        ("5.0.2",),
        "the log-sum-exp differs from the true one by a constant in each row (the output is right)",
    ),
    KnownBad(
        "ScaleDotProductAttention, scaled_dot_product_attention_backward",
        ("5.0.2",),
        "illegal memory access on H200; ignores the mask in backward",
    ),
)


def _version_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def accelerator_type() -> str | None:
    """The device type of this machine's accelerator (``"cuda"``, ``"musa"``, ...), or None where there is none."""
    if torch.cuda.is_available():
        return "cuda"
    current = torch.accelerator.current_accelerator(check_available=True)
    return None if current is None else current.type


def tuned_architecture() -> str | None:
    """The current device's architecture where ``kernels/tiles.py`` has a row of its own for it, else None."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        name = torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability()
        # 8.6, 8.9 and 12.x have 99 KiB of shared memory: they get the default tiles.
        name = f"sm{major}0" if minor == 0 or major == 10 else f"sm{major}{minor}"
    return name if name in TUNED_ARCHITECTURES else None


class FlagGemsProvider(Provider):
    name = "flaggems"
    summary = "FlagGems' Triton forwards, where verified right; gradients by our Triton kernels"
    backward_provider = "triton"
    dtypes = frozenset({torch.float16, torch.bfloat16})
    max_head_dim = 256
    head_dim_multiple = 8
    features = frozenset(
        {"window", "packed", "intervals", "key_mask", "alibi", "softcap", "gqa", "lse", "grad", "deterministic"}
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ops: Any = None
        self._broken: str | None = None

    # --- can it serve at all? ---

    @cache  # noqa: B019 - providers live as long as the process
    def _missing_reason(self) -> str | None:
        """Why flag_gems cannot be used, as far as can be told without importing it."""
        try:
            found = importlib.metadata.version(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            return "flag_gems is not installed (pip install flag_gems)"
        except Exception as error:  # a damaged installation
            return f"flag_gems' version cannot be read ({type(error).__name__}: {error})"
        if found not in VERIFIED:
            return f"flag_gems {found} is not verified (verified: {', '.join(VERIFIED)})"
        try:
            triton = importlib.metadata.version("triton")
        except Exception:
            return "flag_gems needs triton, which is not installed"
        if _version_tuple(triton) >= TRITON_WITHOUT_BLOCK_POINTERS:
            return f"flag_gems {found} needs Triton's block pointers, which Triton 3.9 removed (this is {triton})"
        try:
            device = accelerator_type()
        except Exception as error:  # a broken driver
            return f"the accelerator cannot be asked ({type(error).__name__}: {error})"
        return None if device else "flag_gems needs an accelerator, none is visible"

    def unavailable_reason(self) -> str | None:
        """Also imports flag_gems, the first time, where nothing else speaks against it."""
        reason = self._missing_reason() or missing_tool()
        if reason is None:
            self._load()
            reason = self._broken
        return reason

    def _load(self) -> Any:
        """``flag_gems.ops.attention``, imported once; None where that fails, with the reason in ``_broken``."""
        with self._lock:
            if self._ops is None and self._broken is None:
                printed = io.StringIO()
                try:
                    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        self._ops = importlib.import_module("flag_gems.ops.attention")
                except (Exception, SystemExit) as error:  # no failure of its may reach the caller
                    self._broken = f"flag_gems cannot be imported ({type(error).__name__}: {error})"
                    logger.warning("%s; the provider flaggems is not used in this process", self._broken)
                if printed.getvalue().strip():
                    logger.debug("flag_gems printed at import: %s", printed.getvalue().strip())
            return self._ops

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(DISTRIBUTION)
        except Exception:
            return None

    # --- can it serve this call? ---

    def not_supported_reasons(self, signature: CallSignature) -> list[str]:
        missing = self._missing_reason()
        if missing is None and signature.device_type != accelerator_type():
            # Said before the import: tensors elsewhere must not pay for it.
            return [f"serves tensors on {accelerator_type()}, these are on {signature.device_type}"]
        return super().not_supported_reasons(signature)

    def extra_reasons(self, signature: CallSignature) -> list[str]:
        reasons = []
        if signature.head_dim < 32:
            reasons.append(f"is verified for head dimensions from 32, this is {signature.head_dim}")
        if signature.alibi and _by_rows_needed(signature):
            reasons.append("does not serve ALiBi slopes with row intervals or key masks")
        if signature.alibi and signature.causal and (signature.needs_lse or signature.needs_grad):
            reasons.append("its softmax_lse, which gradients need too, is wrong for ALiBi with causal")
        if signature.needs_grad:
            blocked = self._backward_reasons(signature)
            if blocked:
                reasons.append(f"computes forwards only; {self.backward_provider} cannot do its backward: {blocked}")
        return reasons

    def _backward_reasons(self, signature: CallSignature) -> str:
        from . import PROVIDERS  # the registry imports this module

        server = PROVIDERS.get(str(self.backward_provider))
        return "it is not there" if server is None else "; ".join(server.not_supported_reasons(signature))

    def auto_reasons(self, signature: CallSignature) -> list[str]:
        """Our own kernels first, where they are tuned for the device and serve the call.

        Measured on an H200 with flag_gems 5.0.2 (bf16): a call costs the host 180 to 340 us (torch's SDPA: 20 us);
        its dense forward gives 377 to 439 TFLOP/s at 4k and 16k tokens of head dim 128, where a plain Triton kernel
        with tuned tiles gives 400 to 515; it computes no backward.
        """
        if self._missing_reason() or self._backward_reasons(signature):
            return []
        architecture = tuned_architecture() if signature.device_type == "cuda" else None
        if architecture is not None:
            return [
                f"steps aside on {architecture}: our kernels are tuned for it and were measured faster "
                "(FlagGems' host cost: 180 to 340 us a call)"
            ]
        if _by_rows_needed(signature):
            return ["steps aside for row intervals and key masks, which it serves one query row at a time"]
        return []

    # --- the work ---

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        ops = self._load()
        if ops is None:
            raise RuntimeError(self._broken)
        mask, query = inputs.mask, inputs.query
        _refuse_what_signatures_cannot_say(inputs)
        if not query.numel() or not inputs.key.numel():
            return _nothing_seen(inputs)
        if inputs.softmax_scale <= 0.0:
            # Its running maximum assumes a positive scale, and it takes 0 for the default.
            sign, scale = (-1.0, -inputs.softmax_scale) if inputs.softmax_scale else (0.0, 1.0)
            query = query * sign
        else:
            scale = inputs.softmax_scale
        packed = mask.packed
        if packed is not None and mask.key_mask is None and not (mask.causal or mask.windowed):
            return _varlen(
                ops,
                inputs,
                query,
                scale,
                packed.cu_seqlens_q,
                packed.cu_seqlens_k,
                packed.max_seqlen_q,
                packed.max_seqlen_k,
                packed.causal,
                packed.window,
            )
        if mask.row_intervals is not None or mask.key_mask is not None:
            return _by_rows(ops, inputs, query, scale)
        if _dense_is_right(inputs):
            return _dense(ops, inputs, query, scale)
        index = torch.arange(inputs.batch + 1, dtype=torch.int32, device=query.device)
        return _varlen(
            ops,
            inputs,
            query,
            scale,
            index * inputs.seqlen_q,
            index * inputs.seqlen_k,
            inputs.seqlen_q,
            inputs.seqlen_k,
            mask.causal,
            mask.window,
        )

    def backward(
        self,
        inputs: AttentionInputs,
        out: Tensor,
        softmax_lse: Tensor,
        dout: Tensor,
        *,
        bias_grad: bool,
        sinks_grad: bool,
    ) -> AttentionGradients:
        raise TypeError(f"provider {self.name} computes forwards only; {self.backward_provider} does its backward")


def _refuse_what_signatures_cannot_say(inputs: AttentionInputs) -> None:
    """Lengths and a mask's data are no part of the signature under which a provider is chosen."""
    for name, tensor in (("q", inputs.query), ("k", inputs.key), ("v", inputs.value)):
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        if extent >= 2**31:
            raise NotImplementedError(
                f"provider flaggems: {name} spans {extent} elements; FlagGems counts in 32 bits (up to 2**31 - 1)."
            )
    mask = inputs.mask
    if inputs.alibi_slopes is not None and mask.row_positions is not None:
        raise NotImplementedError("provider flaggems: ALiBi distances from given row positions are not served.")


def _by_rows_needed(signature: CallSignature) -> bool:
    return signature.intervals or signature.key_mask


def _nothing_seen(inputs: AttentionInputs) -> AttentionOutput:
    query = inputs.query
    out = query.new_zeros(*query.shape[:3], inputs.v_head_dim)
    shape = (inputs.batch, inputs.nheads, inputs.seqlen_q)
    return AttentionOutput(out, query.new_full(shape, float("-inf"), dtype=torch.float32))


def _dense_is_right(inputs: AttentionInputs) -> bool:
    """Whether FlagGems' dense kernel finds the right last key of each block of rows (see KNOWN_BAD)."""
    mask, rows = inputs.mask, inputs.seqlen_q
    if not (mask.causal or mask.windowed):
        return True
    # A right side without limit becomes "all keys but one": enough where no diagonal lies left of the keys.
    unlimited = not mask.causal and not 0 <= mask.window[1] < inputs.seqlen_k
    return (rows <= BLOCK_ROWS or rows % BLOCK_ROWS == 0) and not (unlimited and rows > inputs.seqlen_k)


def _window(causal: bool, window: tuple[int, int], largest: int) -> tuple[int, int]:
    """A window as FlagGems understands it: it drops a window with one side at -1, or beyond the number of keys."""
    if window == (-1, -1):
        return window
    left, right = (largest if side < 0 else min(side, largest) for side in window)
    return left, 0 if causal else right


def _dense(ops: Any, inputs: AttentionInputs, query: Tensor, scale: float) -> AttentionOutput:
    mask = inputs.mask
    key, value = _regular(inputs.key), _regular(inputs.value)
    if key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    left, right = _window(mask.causal, mask.window, inputs.seqlen_k - 1)
    out, lse, *_ = ops.flash_attention_forward(
        _regular(query),
        key,
        value,
        None,
        None,
        inputs.seqlen_q,
        inputs.seqlen_k,
        0.0,
        mask.causal,
        False,
        scale=scale,
        softcap=inputs.softcap,
        window_size_left=left,
        window_size_right=right,
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.contiguous(),
        disable_splitkv=True,
    )
    return AttentionOutput(out.contiguous(), _true_lse(inputs, lse))


def _regular(tensor: Tensor) -> Tensor:
    """FlagGems tells the compiler that the batch stride is a multiple of nheads * headdim: copy where it is not."""
    if tensor.shape[0] > 1 and tensor.stride(0) % (tensor.shape[2] * tensor.shape[3]):
        return tensor.contiguous()
    return tensor


def _varlen(
    ops: Any,
    inputs: AttentionInputs,
    query: Tensor,
    scale: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window: tuple[int, int],
) -> AttentionOutput:
    batch, rows = inputs.batch, inputs.seqlen_q
    query, key, value = (t.flatten(0, 1) for t in (query, inputs.key, inputs.value))
    if key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()
    # It drops a window that reaches max_seqlen_k, and at max_seqlen_q = 1 it reorders the log-sum-exp wrongly; both
    # numbers are bounds, so larger ones are as good.
    max_seqlen_q = max(2, max_seqlen_q)
    bound = max_seqlen_q + max_seqlen_k
    out, lse = ops.flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q,
        cu_seqlens_q.contiguous(),
        bound + 1,
        cu_seqlens_k.contiguous(),
        softmax_scale=scale,
        causal=causal,
        window_size=_window(causal, window, bound),
        softcap=inputs.softcap,
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes.contiguous(),
        return_softmax_lse=True,
        out=torch.zeros_like(query, memory_format=torch.contiguous_format),
    )
    if inputs.mask.packed is not None:
        # Rows beyond the last sequence belong to nobody: FlagGems leaves their log-sum-exp unwritten.
        beyond = torch.arange(batch * rows, device=lse.device) >= cu_seqlens_q[-1]
        lse = lse.masked_fill(beyond, float("-inf"))
    lse = lse.view(inputs.nheads, batch, rows).transpose(0, 1).contiguous()
    return AttentionOutput(out.view(batch, rows, inputs.nheads, -1), _true_lse(inputs, lse))


def _by_rows(ops: Any, inputs: AttentionInputs, query: Tensor, scale: float) -> AttentionOutput:
    """Any row intervals and key mask, exactly: each query row is a sequence of one query, and a page table with pages
    of one key tells which keys it sees. Good for decoding; for many rows slow, hence never chosen automatically."""
    batch, rows, keys = inputs.batch, inputs.seqlen_q, inputs.seqlen_k
    device = query.device
    start, length, order = _visible_keys(inputs)
    slots = (order + torch.arange(batch, device=device)[:, None] * keys).to(torch.int32)
    columns = torch.arange(keys, device=device)
    query = query.flatten(0, 1)
    key, value = (t.contiguous().flatten(0, 1).unsqueeze(1) for t in (inputs.key, inputs.value))
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(inputs.nheads, batch * rows, dtype=torch.float32)
    step = min(MAX_SEQUENCES, max(1, MAX_TABLE // keys))
    for begin in range(0, batch * rows, step):
        part = torch.arange(begin, min(begin + step, batch * rows), device=device)
        places = (start[part, None] + columns).clamp(max=keys - 1)
        _, part_lse = ops.flash_attn_varlen_func(
            query[begin : begin + step],
            key,
            value,
            2,  # not 1: see KNOWN_BAD
            torch.arange(len(part) + 1, dtype=torch.int32, device=device),
            keys,
            seqused_k=length[part],
            softmax_scale=scale,
            softcap=inputs.softcap,
            block_table=slots[part // rows].gather(1, places),
            return_softmax_lse=True,
            out=out[begin : begin + step],
        )
        lse[:, begin : begin + step] = part_lse
    lse = lse.view(inputs.nheads, batch, rows).transpose(0, 1).contiguous()
    return AttentionOutput(out.view(batch, rows, inputs.nheads, -1), _true_lse(inputs, lse))


def _visible_keys(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """What each row sees, as a run in an order of the keys that puts those hidden by the key mask last.

    Returns:
        ``start`` int64 and ``length`` int32, ``(batch * seqlen_q,)``, and ``order`` int64 ``(batch, seqlen_k)``.
    """
    batch, rows, keys, device = inputs.batch, inputs.seqlen_q, inputs.seqlen_k, inputs.query.device
    mask = with_intervals(inputs.mask, rows, keys, device)
    if mask.row_intervals is None:
        start = torch.zeros(batch, rows, dtype=torch.int64, device=device)
        end = torch.full_like(start, keys)
    else:
        start, end = mask.row_intervals.long().clamp(0, keys).expand(batch, rows, 2).unbind(-1)
    if mask.key_mask is None:
        order = torch.arange(keys, device=device).expand(batch, keys)
    else:
        real = mask.key_mask.expand(batch, keys)
        before = torch.nn.functional.pad(real.cumsum(-1), (1, 0))
        start, end = before.gather(1, start), before.gather(1, end)
        order = torch.argsort((~real).to(torch.uint8), dim=-1, stable=True)
    return start.flatten(), (end - start).clamp(min=0).to(torch.int32).flatten(), order


def _true_lse(inputs: AttentionInputs, lse: Tensor) -> Tensor:
    """FlagGems says +inf on rows that see nothing, here that is -inf; where its numbers are wrong, NaN says so."""
    if inputs.alibi_slopes is not None and inputs.mask.causal:
        return torch.full_like(lse, float("nan"))
    return lse.masked_fill(lse == float("inf"), float("-inf"))
