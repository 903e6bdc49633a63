"""The provider ``triton``: this package's own Triton kernels, forward and backward, for every feature.

Triton is imported when the first call is served, not with this module.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import settings
from ..inputs import MAX_ROW_STRIDE, AttentionInputs, CallSignature
from .base import ALL_FEATURES, AttentionGradients, AttentionOutput, DecodingStep, Provider
from .toolchain import missing_tool

if TYPE_CHECKING:
    from ..kernels.hopper import backward_launch as hopper_backward

#: As in pyproject.toml.
OLDEST_TRITON = (3, 6)


@cache
def _import_error() -> str | None:
    try:
        import triton
    except ModuleNotFoundError:
        return "triton is not installed (pip install triton)"
    except Exception as error:  # a broken installation fails in many ways, none of which may reach the caller
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    found = getattr(triton, "__version__", None)
    try:
        old = tuple(int(part) for part in str(found).split("+")[0].split(".")[:2]) < OLDEST_TRITON
    except ValueError:
        return f"triton says that its version is {found!r}: not a Triton that is known here"
    if old:
        needed = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found} is too old, {needed} is the oldest supported (pip install -U 'triton>={needed}')"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _accelerator() -> bool:
    return torch.cuda.is_available()


@cache
def _new_enough(device: int) -> bool:
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


class TritonProvider(Provider):
    name = "triton"
    summary = "our Triton kernels: every feature, forward and backward, NVIDIA and AMD; faster ones on Hopper"
    device_types = frozenset({"cuda", "cpu"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    max_head_dim = 512
    features = ALL_FEATURES

    def unavailable_reason(self) -> str | None:
        error = _import_error()
        if error is None and not (_accelerator() or _interpreting()):
            return "needs a CUDA or ROCm device, none is visible (TRITON_INTERPRET=1 runs it slowly on the CPU)"
        return error or (None if _interpreting() else missing_tool())

    def runs_on(self, tensor: Tensor) -> bool:
        """Whether kernels can be launched on a tensor: its device is new enough, or the interpreter's (which rounds to
        bfloat16 by cutting bits off). Where it is not the current device, it has to be made so."""
        device = tensor.device
        if device.type == "cuda":
            return _new_enough(device.index)
        return device.type == "cpu" and _interpreting() and tensor.dtype != torch.bfloat16

    def version(self) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"triton {importlib.metadata.version('triton')}"
        return None

    def extra_reasons(self, signature: CallSignature) -> list[str]:
        if signature.device_type == "cpu":
            if not _interpreting():
                return ["serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"]
            if signature.dtype == torch.bfloat16:
                return ["Triton's interpreter multiplies bfloat16 matrices wrongly"]
        elif signature.device_type == "cuda" and not torch.version.hip:
            capability = torch.cuda.get_device_capability()
            if capability < (8, 0):
                return [f"needs compute capability 8.0 or newer, this is {capability[0]}.{capability[1]}"]
        return []

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        from ..kernels import decode_launch, launch
        from ..kernels.hopper import forward_launch

        if not settings.portable_kernels():
            known = forward_launch.recall(inputs)
            if known is not None:
                return AttentionOutput(*known)
        plain = _plain(inputs)
        with _on_device(inputs.query):
            if decode_launch.serves(plain):
                out, lse = decode_launch.forward(plain)
            elif _hopper_forward_reason(plain) is None:
                out, lse = forward_launch.forward(plain)
            else:
                out, lse = launch.forward(plain)
        if plain.v_head_dim != inputs.v_head_dim:
            out = out[..., : inputs.v_head_dim].contiguous()
        return AttentionOutput(out, lse)

    def kernels(self, inputs: AttentionInputs) -> str:
        from ..kernels import decode_launch

        plain = _plain(inputs)
        if decode_launch.serves(plain):
            return "decoding kernel"
        parts = []
        passes = [("forward", _hopper_forward_reason)]
        if inputs.signature().needs_grad:
            passes.append(("backward", _hopper_backward_reason))
        for name, reason in passes:
            why_not = reason(plain)
            parts.append(f"{name}: portable kernels ({why_not})" if why_not else f"{name}: Hopper kernels")
        return "; ".join(parts)

    def forward_paged(
        self, inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor
    ) -> AttentionOutput | None:
        from ..kernels import decode_launch

        pages = replace(inputs, key=k_cache, value=v_cache)
        if not decode_launch.serves(inputs) or _plain(pages) is not pages:
            return None  # longer queries, and head dimensions that need padding, read a gathered copy
        if block_table.stride(-1) != 1:  # the kernel goes along its rows
            block_table = block_table.contiguous()
        with _on_device(inputs.query):
            return AttentionOutput(*decode_launch.forward(pages, block_table))

    def prepare_decoding(self, inputs: AttentionInputs) -> DecodingStep | None:
        from ..kernels import decode_launch, decode_step

        device = inputs.query.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            return None  # launches go to the current device
        if _plain(inputs) is not inputs or not decode_launch.serves(inputs) or not inputs.seqlen_k:
            return None
        return decode_step.Step(inputs)

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
        from ..kernels import launch

        plain = _plain(inputs)
        v_head_dim = plain.v_head_dim
        out, dout = _padded(out, v_head_dim).contiguous(), _rows_contiguous(_padded(dout, v_head_dim))
        softmax_lse = softmax_lse.contiguous()
        grads: launch.Gradients | hopper_backward.Gradients
        with _on_device(inputs.query):
            if not bias_grad and _hopper_backward_reason(plain) is None:
                from ..kernels.hopper import backward_launch

                grads = backward_launch.backward(plain, out, softmax_lse, dout)
            else:
                grads = launch.backward(plain, out, softmax_lse, dout, bias_grad=bias_grad)
        dq, dk, dv = grads.dq, grads.dk, grads.dv
        if plain.query is not inputs.query:
            if inputs.softmax_scale < 0:
                dq = -dq
            dq, dk = (d[..., : inputs.head_dim].contiguous() for d in (dq, dk))
        if v_head_dim != inputs.v_head_dim:
            dv = dv[..., : inputs.v_head_dim].contiguous()
        dbias = dsinks = None
        if bias_grad and inputs.mask.bias is not None:
            assert isinstance(grads, launch.Gradients) and grads.dscores is not None
            dbias = _reduce_bias(grads.dscores, inputs.mask.bias)
        if sinks_grad and inputs.sinks is not None:
            dsinks = _sinks_gradient(inputs.sinks, softmax_lse, grads.delta)
        return AttentionGradients(dq, dk, dv, dbias, dsinks)


def _hopper_forward_reason(plain: AttentionInputs) -> str | None:
    """Why the portable kernels compute the forward of a call; None: the Hopper kernels do."""
    if settings.portable_kernels():
        return f"{settings.KERNELS}=portable"
    from ..kernels.hopper import forward_launch

    return forward_launch.available_reason() or forward_launch.forward_reason(plain)


def _hopper_backward_reason(plain: AttentionInputs) -> str | None:
    """The same for the backward."""
    if settings.portable_kernels():
        return f"{settings.KERNELS}=portable"
    from ..kernels.hopper import backward_launch

    return backward_launch.backward_reason(plain)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _plain(inputs: AttentionInputs) -> AttentionInputs:
    """The same call as kernels take it; almost always the very same object.

    Copies are made for head dimensions that are no multiple of 8 (padded with zeros), rows that are not contiguous or
    too far apart for 32-bit offsets, and a scale below zero (the kernels fold the scale into a maximum).
    """
    q, k, v, scale = inputs.query, inputs.key, inputs.value, inputs.softmax_scale
    head_dim, v_head_dim = q.shape[3], v.shape[3]
    if head_dim % 8 == 0 and v_head_dim % 8 == 0 and scale > 0 and all(map(_rows_are_fine, (q, k, v))):
        return inputs
    if scale < 0:
        q = -q
    q, k = (_rows_contiguous(_padded(t, -(-head_dim // 8) * 8)) for t in (q, k))
    v = _rows_contiguous(_padded(v, -(-v_head_dim // 8) * 8))
    # A scale of 0 would make 0 * -inf of masked scores; this one is as good as 0.
    return replace(inputs, query=q, key=k, value=v, softmax_scale=abs(scale) or 1e-30)


def _padded(tensor: Tensor, head_dim: int) -> Tensor:
    return tensor if tensor.shape[3] == head_dim else F.pad(tensor, (0, head_dim - tensor.shape[3]))


def _rows_are_fine(tensor: Tensor) -> bool:
    strides = tensor.stride()
    return strides[3] == 1 and strides[1] < MAX_ROW_STRIDE


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if _rows_are_fine(tensor) else tensor.contiguous()


def _reduce_bias(dscores: Tensor, bias: Tensor) -> Tensor:
    """The gradient of the bias from that of the scores: summed over the dimensions it was broadcast over."""
    dims = [i for i in range(4) if bias.shape[i] == 1 and dscores.shape[i] != 1]
    if dims:
        dscores = dscores.sum(dims, keepdim=True, dtype=torch.float32)
    return dscores.to(bias.dtype)


def _sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """``-exp(sink - lse) * delta``: a sink takes weight from values and gives nothing."""
    per_head = sinks.dim() == 1
    logits = sinks.float()[None, :, None] if per_head else sinks.float()
    weights = torch.exp(logits - lse).masked_fill(lse == float("-inf"), 0.0)
    dsinks = -weights * delta
    return dsinks.sum((0, 2)) if per_head else dsinks
