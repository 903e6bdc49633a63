"""The operators: one call of attention, whoever computes it, with its gradient.

Providers made of differentiable PyTorch calls run inline: autograd, ``torch.compile``, autocast and functorch see
through them. Providers with kernels of their own run inside the library op ``hf_flash_plus::attention`` (schema, fake
implementation, autograd formula), which ``torch.compile(fullgraph=True)`` keeps in its graph. This is the only module
with autograd code. Who does the backward is decided in forward and recorded in the graph.

The Library API is used on purpose: an op made with the ``custom_op`` decorator costs about 11 us more a call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .inputs import AttentionInputs, CallSignature, dispatch_modes
from .masks import AttentionMask, PackedSequences, visible
from .paged import gather_pages
from .providers import PROVIDERS, AttentionOutput
from .providers.base import DecodingStep

logger = logging.getLogger("hf_flash_plus")

_library = torch.library.Library("hf_flash_plus", "DEF")

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? row_intervals, Tensor? key_mask, Tensor? key_holes, "
    "Tensor? bias, Tensor? row_positions, Tensor? alibi_slopes, Tensor? sinks, Tensor? dropout_seed, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool packed_causal, "
    "int packed_left, int packed_right, float softmax_scale, bool causal, int window_left, int window_right, "
    "float softcap, float dropout_p, "
    "bool deterministic, str provider"
)
# FlagGems and flash-attn style kernels take strides, but a contiguous last dimension must survive compilation.
_TAGS = (torch.Tag.needs_fixed_stride_order,)
_library.define(f"attention({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(f"attention_forward({_ARGUMENTS}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"paged_attention_forward(Tensor k_cache, Tensor v_cache, Tensor block_table, {_ARGUMENTS}) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "attention_backward(Tensor dout, Tensor out, Tensor softmax_lse, "
    f"{_ARGUMENTS}, bool bias_grad, bool sinks_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

_N_TENSORS = 13  # query .. cu_seqlens_k in _ARGUMENTS


_NOT_PACKED = (None, None, 0, 0, False, (-1, -1))


def _to_arguments(inputs: AttentionInputs, provider: str) -> tuple[Any, ...]:
    mask = inputs.mask
    packed = mask.packed or _NOT_PACKED
    return (
        inputs.query,
        inputs.key,
        inputs.value,
        mask.row_intervals,
        mask.key_mask,
        mask.key_holes,
        mask.bias,
        mask.row_positions,
        inputs.alibi_slopes,
        inputs.sinks,
        inputs.dropout_seed,
        packed[0],
        packed[1],
        packed[2],
        packed[3],
        packed[4],
        packed[5][0],
        packed[5][1],
        float(inputs.softmax_scale),
        mask.causal,
        mask.window[0],
        mask.window[1],
        float(inputs.softcap),
        float(inputs.dropout_p),
        inputs.deterministic,
        provider,
    )


def _from_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row_intervals: Tensor | None,
    key_mask: Tensor | None,
    key_holes: Tensor | None,
    bias: Tensor | None,
    row_positions: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    packed_causal: bool,
    packed_left: int,
    packed_right: int,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    provider: str,
) -> tuple[AttentionInputs, str]:
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        window = (packed_left, packed_right)
        packed = PackedSequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, packed_causal, window)
    mask = AttentionMask(
        causal, (window_left, window_right), row_intervals, key_mask, key_holes, bias, row_positions, packed
    )
    inputs = AttentionInputs(
        query, key, value, softmax_scale, mask, softcap, alibi_slopes, sinks, dropout_p, dropout_seed, deterministic,
        needs_lse=True,
    )  # fmt: skip
    return inputs, provider


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, provider = _from_arguments(*arguments)
    output = PROVIDERS[provider].forward(inputs)
    assert output.softmax_lse is not None
    return output.out, output.softmax_lse


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, seqlen_q, nheads, _head_dim = query.shape
    out = query.new_empty(batch, seqlen_q, nheads, value.shape[-1])
    return out, query.new_empty(batch, nheads, seqlen_q, dtype=torch.float32)


def _paged_forward(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    inputs, name = _from_arguments(*arguments)
    provider = PROVIDERS[name]
    output = provider.forward_paged(inputs, k_cache, v_cache, block_table)
    if output is None:
        output = provider.forward(_gathered(inputs, k_cache, v_cache, block_table))
    assert output.softmax_lse is not None
    return output.out, output.softmax_lse


def _paged_forward_fake(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _forward_fake(*arguments)


def _backward(dout: Tensor, out: Tensor, softmax_lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *call, bias_grad, sinks_grad = arguments
    inputs, provider = _from_arguments(*call)
    server = PROVIDERS[PROVIDERS[provider].backward_provider or provider]
    grads = server.backward(inputs, out, softmax_lse, dout, bias_grad=bias_grad, sinks_grad=sinks_grad)
    none = dout.new_empty(0)
    return (
        grads.dq,
        grads.dk,
        grads.dv,
        none if grads.dbias is None else grads.dbias,
        dout.new_empty(0) if grads.dsinks is None else grads.dsinks,
    )


def _backward_fake(dout: Tensor, out: Tensor, softmax_lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    query, key, value, bias, sinks = (arguments[i] for i in (0, 1, 2, 6, 9))
    *_, bias_grad, sinks_grad = arguments
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        bias.new_empty(bias.shape) if bias_grad else dout.new_empty(0),
        sinks.new_empty(sinks.shape, dtype=torch.float32) if sinks_grad else dout.new_empty(0),
    )


for _name, _real, _fake in (
    ("attention", _forward, _forward_fake),
    ("attention_forward", _forward, _forward_fake),
    ("paged_attention_forward", _paged_forward, _paged_forward_fake),
    ("attention_backward", _backward, _backward_fake),
):
    _library.impl(_name, _real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hf_flash_plus::{_name}", _fake, lib=_library)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, softmax_lse = output
    ctx.save_for_backward(*inputs[:_N_TENSORS], out, softmax_lse)
    ctx.constants = inputs[_N_TENSORS:]
    ctx.mark_non_differentiable(softmax_lse)
    ctx.set_materialize_grads(False)


def _autograd_backward(
    ctx: Any, dout: Tensor | None, _dlse: Tensor | None, compute: Callable[..., tuple[Tensor, ...]] | None = None
) -> tuple[Any, ...]:
    *tensors, out, softmax_lse = ctx.saved_tensors
    grads: list[Any] = [None] * (_N_TENSORS + len(ctx.constants))
    if dout is None:
        return tuple(grads)
    bias_grad, sinks_grad = ctx.needs_input_grad[6], ctx.needs_input_grad[9]
    dq, dk, dv, dbias, dsinks = (compute or torch.ops.hf_flash_plus.attention_backward)(
        dout, out, softmax_lse, *tensors, *ctx.constants, bias_grad, sinks_grad
    )
    grads[:3] = [dq, dk, dv]
    if bias_grad:
        grads[6] = dbias
    if sinks_grad:
        grads[9] = dsinks.to(tensors[9].dtype)
    return tuple(grads)


#: What to do where kernels cannot follow. torch's SDPA is no advice: its fused kernels have one derivative, too.
_ANY_DERIVATIVE = (
    'compute the call inside `with hf_flash_plus.use_provider("reference"):`, which is made of operations of torch and '
    "has derivatives of every kind and order."
)


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the kernels of hf_flash_plus have no second derivative (create_graph=True, nested transforms of torch.func); "
        f"{_ANY_DERIVATIVE}"
    )


torch.library.register_autograd(
    "hf_flash_plus::attention", _autograd_backward, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("hf_flash_plus::attention_backward", _no_double_backward, lib=_library)


class _Attention(torch.autograd.Function):
    """The differentiable op for a call that nobody watches.

    The same formula without the dispatcher, which spends 600 us on an op of 26 arguments with a registered gradient:
    more than a short sequence's forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, inputs: AttentionInputs, provider: str, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        output = PROVIDERS[provider].forward(inputs)
        assert output.softmax_lse is not None
        _setup_context(ctx, _to_arguments(inputs, provider), (output.out, output.softmax_lse))
        return output.out, output.softmax_lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        *tensors, out, softmax_lse = ctx.saved_tensors
        *_, bias_grad, sinks_grad = ctx.needs_input_grad
        # With create_graph the op says that there is no second derivative; batched gradients it takes one by one.
        watching = torch.is_grad_enabled() or watched() or torch._C._functorch.is_legacy_batchedtensor(dout)
        compute = torch.ops.hf_flash_plus.attention_backward if watching else _backward
        dq, dk, dv, dbias, dsinks = compute(dout, out, softmax_lse, *tensors, *ctx.constants, bias_grad, sinks_grad)
        dsinks = dsinks.to(tensors[9].dtype) if sinks_grad else None
        return None, None, dq, dk, dv, dbias if bias_grad else None, dsinks


#: An error with fullgraph=True only: elsewhere torch.compile leaves the function that raises it as it stands.
_NOT_COMPILED = (
    "torch.compile(fullgraph=True) has no way to take the kernels of hf_flash_plus through transforms of torch.func "
    f"(grad, vjp, vmap, jvp, ...): compile without fullgraph, or {_ANY_DERIVATIVE}"
)


def _no_forward_mode(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the kernels of hf_flash_plus have no derivative in forward mode (torch.func.jvp, jacfwd, linearize, dual "
        f"tensors), and q, k, v, the bias or s_aux has a tangent; {_ANY_DERIVATIVE}"
    )


class _Transformed(torch.autograd.Function):
    """The differentiable op for transforms of ``torch.func`` and dual tensors.

    The gradient registered with the op is none that transforms accept, and the dispatcher would drop tangents, and
    gradients of batched tensors, without an error. Here every transform finds a rule, or is refused.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, softmax_lse = torch.ops.hf_flash_plus.attention_forward(*arguments)
        return out, softmax_lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:_N_TENSORS], *output)  # vmap looks for them before it calls jvp

    jvp = staticmethod(_no_forward_mode)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Any, ...]:
        return _autograd_backward(ctx, dout, _dlse, _TransformedBackward.apply)


class _TransformedBackward(torch.autograd.Function):
    """The backward of :class:`_Transformed`: it can be batched, but has no derivatives of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.hf_flash_plus.attention_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: neither direction is computed."""

    jvp = staticmethod(_no_forward_mode)
    backward = staticmethod(_no_double_backward)


def autocast_dtype(query: Tensor) -> torch.dtype | None:
    """The dtype in which ``torch.autocast`` has attention of such queries computed; None where it is not enabled."""
    device_type = query.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or query.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device_type)


def _autocast(inputs: AttentionInputs) -> AttentionInputs:
    """Under ``torch.autocast``: q, k, v (and a floating bias) in its dtype, as torch casts for its own SDPA."""
    dtype = autocast_dtype(inputs.query)
    if dtype is None:
        return inputs
    bias = inputs.mask.bias
    mask = inputs.mask
    if bias is not None and bias.dtype not in (torch.bool, dtype):
        mask = replace(mask, bias=bias.to(dtype))
    return replace(
        inputs, query=inputs.query.to(dtype), key=inputs.key.to(dtype), value=inputs.value.to(dtype), mask=mask
    )


def _debug(inputs: AttentionInputs, caller: str, provider: str, why: str) -> None:
    logger.debug(
        "%s: q %s k %s v %s %s on %s, mask %s, dropout %g -> %s (%s)",
        caller,
        tuple(inputs.query.shape),
        tuple(inputs.key.shape),
        tuple(inputs.value.shape),
        str(inputs.query.dtype).removeprefix("torch."),
        inputs.query.device,
        inputs.mask.kind,
        inputs.dropout_p,
        provider,
        why,
    )


def _without_unseen(inputs: AttentionInputs) -> AttentionInputs:
    """The same call with zeros for keys and values that no row sees, and for rows that see nothing: a weight of 0 does
    not hide a NaN, in the output or in a gradient."""
    seen = visible(inputs.mask, inputs.seqlen_q, inputs.seqlen_k, inputs.query.device)
    if seen is None:
        return inputs
    hidden = ~seen.any(dim=(1, 2))[:, :, None, None]
    empty = ~seen.any(dim=(1, 3))[:, :, None, None]
    key, value = (t.masked_fill(hidden, 0.0) for t in (inputs.key, inputs.value))
    return replace(inputs, query=inputs.query.masked_fill(empty, 0.0), key=key, value=value)


def attention(inputs: AttentionInputs, caller: str = "attention", unwritten: bool = False) -> AttentionOutput:
    """Compute one validated call with the provider that serves it.

    Args:
        inputs: the call (see :class:`~hf_flash_plus.inputs.AttentionInputs`), validated.
        caller: the public function's name, for the DEBUG log.
        unwritten: keys that no row sees, and rows that see nothing, may be memory that nobody wrote (slots of a cache,
            rows behind the last packed sequence), NaN included.

    Returns:
        ``out`` ``(batch, seqlen_q, nheads, v_head_dim)``, and ``softmax_lse`` where ``inputs.needs_lse``.

    Raises:
        NoProviderError: no provider can serve the call; lists all reasons.
    """
    inputs = _autocast(inputs)
    signature = inputs.signature()
    if torch.compiler.is_compiling():
        name = dispatch.select_name(tuple(signature))
        provider = PROVIDERS[name]
    else:
        if _transforms():
            signature = _below_transforms(inputs, signature)
        selection = dispatch.select_provider(signature)
        provider, name = selection.provider, selection.provider.name
        if logger.isEnabledFor(logging.DEBUG):
            kernels = provider.kernels(inputs)
            _debug(inputs, caller, name, f"{selection.why}; {kernels}" if kernels else selection.why)
    if provider.differentiable:
        if unwritten and provider.reads_hidden_keys:
            inputs = _without_unseen(inputs)
        output = provider.forward(inputs)
        if output.softmax_lse is not None:
            # As from kernels, which have no gradient for it: who serves a call must not change what a loss trains.
            output = output._replace(softmax_lse=output.softmax_lse.detach())
        return output
    if inputs.dropout_p > 0.0 and inputs.dropout_seed is None:
        # Drawn by an ordinary random op: obeys torch.manual_seed, gradient checkpointing and CUDA graph capture.
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=inputs.query.device)
        inputs = replace(inputs, dropout_seed=seed)
    if _nobody_watches(inputs.query):
        if not signature.needs_grad:
            return provider.forward(inputs)
        # The kernels need the log-sum-exp for the backward, whether or not the caller wants it.
        inputs = replace(inputs, needs_lse=True)
        out, softmax_lse = _Attention.apply(
            inputs, name, inputs.query, inputs.key, inputs.value, inputs.mask.bias, inputs.sinks
        )
        return AttentionOutput(out, softmax_lse)
    op: Callable[..., tuple[Tensor, Tensor]]
    if _transformed():
        if torch.compiler.is_compiling():
            raise NotImplementedError(_NOT_COMPILED)
        op = _Transformed.apply  # for every call: that no tensor requires a gradient says nothing about tangents
    else:
        op = torch.ops.hf_flash_plus.attention if signature.needs_grad else torch.ops.hf_flash_plus.attention_forward
    out, softmax_lse = op(*_to_arguments(inputs, name))
    return AttentionOutput(out, softmax_lse)


def _nobody_watches(query: Tensor) -> bool:
    """Whether nothing needs to see the call as a library op: no compiler, no tensor subclass, nobody who watches
    (:func:`watched`).

    Going through the dispatcher costs 15 us, about as much as launching a kernel.
    """
    return type(query) is Tensor and not torch.compiler.is_compiling() and not watched()


def watched() -> bool:
    """Whether somebody needs to see torch's operations one by one: functorch transforms, dispatch modes (``make_fx``),
    ``torch.jit.trace``, differentiation in forward mode. A launch would pass them by, without an error."""
    return bool(_transforms() or dispatch_modes() or _tracing() or forward_ad._current_level >= 0)


def _transformed() -> bool:
    """Whether a transform of ``torch.func``, or differentiation in forward mode, is under way. Read where
    ``torch.compile`` sees it, so that code compiled outside of dual levels is not run inside."""
    return _inside_transforms() or forward_ad._current_level >= 0


def _inside_transforms() -> bool:
    return bool(_transforms())


# Asked while a graph is traced; torch.compile guards this answer by itself. (As for dispatch.select_name.)
_inside_transforms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _below_transforms(inputs: AttentionInputs, signature: CallSignature) -> CallSignature:
    """The signature with the gradients that transforms will ask for: a batched tensor in ``grad(vmap(...))`` says that
    it needs none, but stands for one that does."""
    if not torch.is_grad_enabled():
        return signature
    bias = inputs.mask.bias
    bias_grad = bias is not None and _needs_gradient(bias)
    tensors = (inputs.query, inputs.key, inputs.value, inputs.sinks)
    needs_grad = bias_grad or any(t is not None and _needs_gradient(t) for t in tensors)
    return signature._replace(needs_grad=needs_grad, bias_grad=bias_grad)


def _needs_gradient(tensor: Tensor) -> bool:
    while not tensor.requires_grad:
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


# Private, but what torch's own libraries ask; where one is missing, every call goes through the dispatcher.
_transforms = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_tracing = getattr(torch._C, "_is_tracing", lambda: True)
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def prepare_decoding(inputs: AttentionInputs) -> DecodingStep | None:
    """A shorter way to compute later calls like this one-row, validated, gradient-free call, where there is one.

    It holds as long as :func:`undisturbed` is true and :func:`.settings.selection` returns the same.
    """
    if inputs.dropout_p > 0.0 or inputs.alibi_slopes is not None or inputs.sinks is not None or inputs.needs_lse:
        return None
    mask = inputs.mask
    if mask.bias is not None or mask.packed is not None or inputs.seqlen_q != 1:
        return None
    if mask.key_mask is not None and (mask.row_intervals is None or mask.key_holes is None):
        return None
    signature = inputs.signature()
    if signature.needs_grad:
        return None
    return dispatch.select_provider(signature).provider.prepare_decoding(inputs)


def undisturbed(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call needs nothing but its result: no gradients, no autocast, nobody who watches, no tensor subclass,
    no log that wants to see it. Compilers are to be asked about before."""
    return not (
        torch.is_grad_enabled()
        or not type(query) is type(key) is type(value) is Tensor
        or watched()
        or _any_autocast()
        or logger.isEnabledFor(logging.DEBUG)
    )


def paged_attention(
    inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, caller: str
) -> AttentionOutput:
    """:func:`attention` over a paged cache, forward only; pages are gathered for providers that do not read them.

    Args:
        inputs: the validated call; ``key`` and ``value`` are stand-ins of shape
            ``(batch, max_blocks * page_size, ...)``.
        k_cache, v_cache, block_table: as in :meth:`~hf_flash_plus.providers.base.Provider.forward_paged`.
    """
    computed_in = autocast_dtype(inputs.query) or inputs.query.dtype
    same_dtype = computed_in == inputs.query.dtype == k_cache.dtype == v_cache.dtype
    if torch.compiler.is_compiling():
        name = dispatch.select_name(tuple(inputs.signature()))
        if same_dtype and not PROVIDERS[name].differentiable and not _transformed():
            # One op, which finds out when it runs whether the provider reads pages.
            out, softmax_lse = torch.ops.hf_flash_plus.paged_attention_forward(
                k_cache, v_cache, block_table, *_to_arguments(inputs, name)
            )
            return AttentionOutput(out, softmax_lse)
    elif same_dtype and _nobody_watches(inputs.query):
        selection = dispatch.select_provider(inputs.signature())
        output = selection.provider.forward_paged(inputs, k_cache, v_cache, block_table)
        if output is not None:
            if logger.isEnabledFor(logging.DEBUG):
                _debug(inputs, caller, selection.provider.name, f"{selection.why}, from pages")
            return output
    return attention(_gathered(inputs, k_cache, v_cache, block_table), caller, unwritten=True)


def _gathered(inputs: AttentionInputs, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> AttentionInputs:
    return replace(inputs, key=gather_pages(k_cache, block_table), value=gather_pages(v_cache, block_table))
