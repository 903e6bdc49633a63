"""The provider ``flash_attn``: the flash-attn packages 4, 3 and 2, whichever is importable, newest first.

Its place in ``FLASH_ATTENTION_USE_FLAGGEMS=FALSE`` is first. Each generation has its own signature; one small
adapter each says what it serves and how it is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..inputs import MAX_GRID, AttentionInputs, CallSignature
from .base import AttentionOutput, Provider

HALF = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True)
class Generation:
    """One generation of flash-attn: where it lives, on which devices it runs, what it serves, how it is called."""

    number: int
    module: str
    distribution: str
    min_capability: int
    features: frozenset[str]
    arguments: Callable[[AttentionInputs], dict[str, Any]]

    def foreign_interface(self, module: Any) -> str | None:
        """What the functions of an installed version do not take of what this adapter passes; None: they take it.

        Version numbers promise little here (betas, forks), so the functions themselves are asked.
        """
        needed = set(self.arguments(_ANY_CALL))
        for name, more in (("flash_attn_func", set()), ("flash_attn_varlen_func", _VARLEN)):
            function = getattr(module, name, None)
            if function is None:
                return f"{self.module} has no {name}"
            try:
                parameters = inspect.signature(function).parameters
            except (TypeError, ValueError):  # a compiled function that does not say
                continue
            lacking = (needed | more) - set(parameters)
            if lacking and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return f"{name} takes no {', '.join(sorted(lacking))}"
        return None


_NO_TENSOR = torch.empty(0)
_ANY_CALL = AttentionInputs(_NO_TENSOR, _NO_TENSOR, _NO_TENSOR, 1.0)
_VARLEN = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}


def _window(inputs: AttentionInputs) -> tuple[bool, tuple[int, int]]:
    packed = inputs.mask.packed
    return (packed.causal, packed.window) if packed else (inputs.mask.causal, inputs.mask.window)


def _arguments_2(inputs: AttentionInputs) -> dict[str, Any]:
    causal, window = _window(inputs)
    return {
        "dropout_p": inputs.dropout_p,
        "softmax_scale": inputs.softmax_scale,
        "causal": causal,
        "window_size": window,
        "softcap": inputs.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "deterministic": inputs.deterministic,
        "return_attn_probs": inputs.needs_lse,
    }


def _arguments_3(inputs: AttentionInputs) -> dict[str, Any]:
    causal, window = _window(inputs)
    return {
        "softmax_scale": inputs.softmax_scale,
        "causal": causal,
        "window_size": window,
        "softcap": inputs.softcap,
        "deterministic": inputs.deterministic,
        "return_attn_probs": inputs.needs_lse,
    }


def _arguments_4(inputs: AttentionInputs) -> dict[str, Any]:
    causal, window = _window(inputs)
    arguments: dict[str, Any] = {
        "softmax_scale": inputs.softmax_scale,
        "causal": causal,
        "window_size": tuple(None if w < 0 else w for w in window),
        "softcap": inputs.softcap,
        "deterministic": inputs.deterministic,
        "return_lse": inputs.needs_lse,
    }
    if inputs.sinks is not None:
        arguments["learnable_sink"] = inputs.sinks.to(torch.bfloat16)
    return arguments


_COMMON = frozenset({"window", "packed", "gqa", "lse", "grad"})
GENERATIONS = (
    # flash-attn 4's sinks have no gradient for the sink itself, its softcap none for anything in the betas we saw.
    Generation(4, "flash_attn.cute", "flash-attn-4", 9, _COMMON | {"v_head_dim", "sinks", "softcap"}, _arguments_4),
    Generation(3, "flash_attn_interface", "flash-attn-3", 9, _COMMON | {"softcap", "deterministic"}, _arguments_3),
    Generation(
        2,
        "flash_attn",
        "flash-attn",
        8,
        _COMMON | {"softcap", "alibi", "dropout", "deterministic"},
        _arguments_2,
    ),
)


@cache
def _find() -> tuple[Generation, Any, str] | str:
    """The newest importable generation that the device runs, with its module and version; else why there is none."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, none is visible"
    capability = torch.cuda.get_device_capability()[0]
    reasons = []
    for generation in GENERATIONS:
        name = generation.distribution
        try:
            found = importlib.metadata.version(name)
            module = importlib.import_module(generation.module)
            foreign = generation.foreign_interface(module)
        except importlib.metadata.PackageNotFoundError:
            reasons.append(f"{name} is not installed")
        except Exception as error:  # a broken binary package fails in many ways, none of which may reach the caller
            reasons.append(f"{name} cannot be imported ({type(error).__name__}: {error})")
        else:
            if foreign is None and capability >= generation.min_capability:
                return generation, module, found
            if foreign is not None:
                reasons.append(f"{name} {found} has an interface that is not known here ({foreign})")
            else:
                reasons.append(f"{name} needs compute capability {generation.min_capability}.0 or newer")
    return "; ".join(reasons)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    result = function(*args, **kwargs)
    return (result[0], result[1]) if isinstance(result, tuple) else (result, None)


class FlashAttnProvider(Provider):
    name = "flash_attn"
    summary = "the flash-attn packages, newest first (4, 3, 2)"
    differentiable = True
    device_types = frozenset({"cuda"})
    dtypes = HALF
    max_head_dim = 256
    head_dim_multiple = 8

    def unavailable_reason(self) -> str | None:
        found = _find()
        return found if isinstance(found, str) else None

    def version(self) -> str | None:
        found = _find()
        return None if isinstance(found, str) else f"{found[0].distribution} {found[2]}"

    @property
    def features(self) -> frozenset[str]:  # type: ignore[override]
        found = _find()
        return frozenset() if isinstance(found, str) else found[0].features

    def extra_reasons(self, signature: CallSignature) -> list[str]:
        found = _find()
        reasons = []
        # The batch and the heads are dimensions of the kernels' grids; since version 3, packed sequences are none.
        if signature.nheads > MAX_GRID:
            reasons.append(f"its CUDA grid holds {MAX_GRID} heads, these are {signature.nheads}")
        if signature.oversized and not (signature.packed and not isinstance(found, str) and found[0].number > 2):
            what = "packed sequences" if signature.packed else "batch elements"
            reasons.append(
                f"its CUDA grid holds {MAX_GRID} {what}, these are {signature.oversized}: split the call, or leave the "
                "choice to automatic selection (torch_sdpa splits it)"
            )
        if not isinstance(found, str) and found[0].number == 4 and signature.needs_grad:
            if signature.sinks != "none":
                reasons.append("flash-attn 4 computes no gradient of the sinks")
            if signature.softcap:
                reasons.append("flash-attn 4 computes no gradients with softcap")
            if signature.nheads != signature.nheads_k and signature.head_dim != signature.v_head_dim:
                dims = f"{signature.head_dim} and {signature.v_head_dim}"
                reasons.append(f"flash-attn 4 computes no gradients of grouped heads with head dimensions {dims}")
        return reasons

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        found = _find()
        assert not isinstance(found, str)
        generation, module, _ = found
        if not inputs.query.numel() or not inputs.key.numel():
            return _nothing_seen(inputs)
        arguments = generation.arguments(inputs)
        packed = inputs.mask.packed
        if packed is None:
            out, lse = _call(module.flash_attn_func, inputs.query, inputs.key, inputs.value, **arguments)
        else:
            out, lse = _call(
                module.flash_attn_varlen_func,
                inputs.query[0],
                inputs.key[0],
                inputs.value[0],
                cu_seqlens_q=packed.cu_seqlens_q,
                cu_seqlens_k=packed.cu_seqlens_k,
                max_seqlen_q=packed.max_seqlen_q,
                max_seqlen_k=packed.max_seqlen_k,
                **arguments,
            )
            out = out[None]
            lse = None if lse is None else lse[None]
        if lse is not None:
            # flash-attn says +inf on rows that see nothing; here that is -inf.
            lse = lse.masked_fill(lse == float("inf"), float("-inf"))
        return AttentionOutput(out, lse)


def _nothing_seen(inputs: AttentionInputs) -> AttentionOutput:
    """Zeros where there are no queries or no keys, which the packages' kernels do not expect."""
    q = inputs.query
    every = torch.ones((), dtype=torch.bool, device=q.device)
    # Filled, not multiplied: 0 * inf is NaN. And so the output has its (zero) gradients.
    zero = sum(tensor.masked_fill(every, 0.0).sum() for tensor in (q, inputs.key, inputs.value))
    out = zero.to(q.dtype).expand(*q.shape[:3], inputs.v_head_dim).contiguous()
    lse = None
    if inputs.needs_lse:
        lse = torch.full((inputs.batch, inputs.nheads, inputs.seqlen_q), float("-inf"), device=q.device)
    return AttentionOutput(out, lse)
