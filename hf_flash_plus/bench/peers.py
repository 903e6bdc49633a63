"""The implementations that are measured: how each is called, on which problems, and where it is declined.

A peer's builder gets a :class:`Problem` and returns a :class:`Prepared` call, or raises :class:`Declined` with the
reason. Whatever does not belong to the attention call itself (masks, unpadding, compilation) is done while building.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Problem


class Declined(Exception):
    """A peer cannot compute a problem, or is not there; the message is the reason."""


@dataclass(frozen=True)
class Prepared:
    """A call ready to be timed.

    Attributes:
        inputs: leaves of q, k, v in the peer's own layout; gradients are taken for them.
        dout: gradient of the output, in the peer's layout.
        forward: computes the output from ``inputs``.
        dense: brings an output or a gradient back to ``(batch, seqlen, heads, head_dim)``.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    forward: Callable[[], Tensor]
    dense: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A name for tables, one line of description, and the builder."""

    name: str
    summary: str
    build: Callable[[Problem, bool], Prepared]


def _same(tensor: Tensor) -> Tensor:
    return tensor


# --- ours ---


def _ours(provider: str | None) -> Callable[[Problem, bool], Prepared]:
    def build(problem: Problem, training: bool) -> Prepared:
        from .. import dispatch
        from ..dispatch import NoProviderError, use_provider
        from ..inputs import AttentionInputs
        from ..interface import attention

        if provider is not None and provider not in dispatch.PROVIDERS:
            raise Declined(f"there is no provider {provider!r}")
        if problem.case.page_size:
            return _paged(problem, provider)
        q, k, v = problem.leaves()
        mask = problem.mask
        with torch.set_grad_enabled(training), use_provider(provider) if provider else nullcontext():
            try:
                dispatch.select_provider(AttentionInputs(q, k, v, problem.scale, mask).signature())
            except NoProviderError as error:
                raise Declined("; ".join(line.strip() for line in str(error).splitlines()[1:-1])) from None

        def forward() -> Tensor:
            if provider is None:
                return attention(q, k, v, mask)
            with use_provider(provider):
                return attention(q, k, v, mask)

        return Prepared((q, k, v), problem.dout, forward, _same)

    return build


def _paged(problem: Problem, provider: str | None) -> Prepared:
    """From pages, as continuous batching reads them; all layers have one block table and the same row intervals."""
    from .. import ops
    from ..dispatch import use_provider
    from ..inputs import AttentionInputs, validate
    from ..masks import AttentionMask

    q, case = problem.q, problem.case
    k_pages, v_pages, table = problem.pages
    keys, values = (t.new_empty(()).expand(case.batch, case.seqlen, *t.shape[2:]) for t in (k_pages, v_pages))
    inputs = AttentionInputs(q, keys, values, problem.scale, AttentionMask(row_intervals=problem.page_intervals))
    validate(inputs)

    def forward() -> Tensor:
        with torch.no_grad(), use_provider(provider) if provider else nullcontext():
            return ops.paged_attention(inputs, k_pages, v_pages, table, "bench").out

    return Prepared((q, problem.k, problem.v), problem.dout, forward, _same)


def _layer(implementation: str) -> Callable[[Problem, bool], Prepared]:
    """A decoding step's call as a layer of a Transformers model makes it, in its layout and with its mask."""

    def build(problem: Problem, training: bool) -> Prepared:
        case = problem.case
        if not case.decoding or case.page_size or training:
            raise Declined("measured on decoding from one cache only")
        try:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        except ImportError as error:
            raise Declined(f"cannot be imported ({error})") from None
        padding = None
        if case.mask == "padded":
            index = torch.arange(case.seqlen, device=problem.device)
            padding = index[None] >= case.seqlen - problem.lengths[:, None]
        mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=case.batch, q_length=1, kv_length=case.seqlen, q_offset=case.seqlen - 1, attention_mask=padding,
            device=problem.device, dtype=problem.dtype,
        )  # fmt: skip
        module = torch.nn.Module()
        module.is_causal, module.num_key_value_groups = True, case.heads // case.kv_heads
        q, k, v = problem.heads_first
        attend = ALL_ATTENTION_FUNCTIONS[implementation]

        def forward() -> Tensor:
            out: Tensor = attend(module, q, k, v, mask, dropout=0.0, scaling=problem.scale)[0]
            return out

        return Prepared((q, k, v), problem.dout, forward, _same)

    return build


# --- torch ---


def _decline_pages(problem: Problem) -> None:
    if problem.case.page_size:
        raise Declined("reads no pages")


def _sdpa(backend: str | None) -> Callable[[Problem, bool], Prepared]:
    def build(problem: Problem, training: bool) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        _decline_pages(problem)
        q, k, v = problem.leaves()
        mask = problem.dense_mask
        causal = problem.causal and mask is None and not problem.case.decoding
        groups = problem.case.heads // problem.case.kv_heads
        if backend == "FLASH_ATTENTION" and mask is not None:
            raise Declined("SDPA's flash backend takes no mask")
        context = nullcontext if backend is None else (lambda: sdpa_kernel([getattr(SDPBackend, backend)]))

        def forward() -> Tensor:
            key, value = k.transpose(1, 2), v.transpose(1, 2)
            grouped = groups > 1
            if grouped and mask is not None:
                # As Transformers does: with a mask, SDPA's enable_gqa falls to the unfused math backend.
                key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
                grouped = False
            with context():
                out = F.scaled_dot_product_attention(
                    q.transpose(1, 2), key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped
                )
            return out.transpose(1, 2)

        return Prepared((q, k, v), problem.dout, forward, _same)

    return build


def _flex(problem: Problem, training: bool) -> Prepared:
    if problem.device.type != "cuda":
        raise Declined("FlexAttention is measured on CUDA only")
    if problem.case.decoding:
        raise Declined("FlexAttention is not measured on decoding")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One compiled function for all shapes would hit torch's recompile limit after 8, and fall to the eager version.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if problem.case.mask != "full":
        intervals = problem.intervals
        start, end = intervals[..., 0].contiguous(), intervals[..., 1].contiguous()
        per_batch = intervals.shape[0] > 1

        def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
            row = b if per_batch else 0
            return (j >= start[row, i]) & (j < end[row, i])

        def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
            return i + (problem.case.seqlen - problem.case.rows) >= j

        block_mask = create_block_mask(
            causal if problem.causal else visible,
            problem.case.batch if per_batch else None,
            None,
            problem.case.rows,
            problem.case.seqlen,
            device=str(problem.device),
        )
    q, k, v = problem.leaves()
    grouped = problem.case.heads != problem.case.kv_heads

    def forward() -> Tensor:
        out = compiled(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return Prepared((q, k, v), problem.dout, forward, _same)


# --- flash-attn ---

_FLASH_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}


def _flash_attn(generation: int) -> Callable[[Problem, bool], Prepared]:
    def build(problem: Problem, training: bool) -> Prepared:
        if problem.device.type != "cuda":
            raise Declined("flash-attn needs CUDA")
        _decline_pages(problem)
        if problem.case.decoding and problem.case.mask == "padded":
            raise Declined("not measured on padded decoding: it would need the keys of each row in one piece")
        try:
            module = importlib.import_module(_FLASH_MODULES[generation])
            dense_func, varlen_func = module.flash_attn_func, module.flash_attn_varlen_func
        except Exception as error:  # binary packages fail to import in many ways
            raise Declined(f"cannot be imported ({type(error).__name__}: {error})") from None
        if problem.case.mask in ("padded", "packed"):
            return _unpadded(problem, lambda q, k, v, **options: _first(varlen_func(q, k, v, **options)))
        options: dict[str, Any] = {"causal": problem.case.mask != "full"}
        if problem.case.mask == "window":
            options["window_size"] = (problem.case.window, 0)
        q, k, v = problem.leaves()
        return Prepared((q, k, v), problem.dout, lambda: _first(dense_func(q, k, v, **options)), _same)

    return build


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _unpadded(problem: Problem, function: Callable[..., Tensor]) -> Prepared:
    """A varlen call on the real tokens only. Unpadding and padding back are not in the time (in its favour)."""
    case, index = problem.case, problem.real_index

    def pick(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1)[index].contiguous()

    def dense(tensor: Tensor) -> Tensor:
        full = tensor.new_zeros(case.batch * case.seqlen, *tensor.shape[1:])
        full[index] = tensor
        return full.view(case.batch, case.seqlen, *tensor.shape[1:])

    q, k, v = (pick(t).requires_grad_() for t in (problem.q, problem.k, problem.v))
    options = {
        "cu_seqlens_q": problem.cu_seqlens,
        "cu_seqlens_k": problem.cu_seqlens,
        "max_seqlen_q": max(case.lengths),
        "max_seqlen_k": max(case.lengths),
        "causal": True,
    }
    return Prepared((q, k, v), pick(problem.dout), lambda: function(q, k, v, **options), dense)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("flash_plus", "hf_flash_plus, provider chosen automatically", _ours(None)),
        Peer("triton", "hf_flash_plus, provider triton", _ours("triton")),
        Peer("flaggems", "hf_flash_plus, provider flaggems", _ours("flaggems")),
        Peer("flash_attn", "hf_flash_plus, provider flash_attn", _ours("flash_attn")),
        Peer("torch_sdpa", "hf_flash_plus, provider torch_sdpa", _ours("torch_sdpa")),
        Peer("reference", "hf_flash_plus, provider reference", _ours("reference")),
        Peer("layer", "flash_plus as a layer of a Transformers model calls it", _layer("flash_plus")),
        Peer("layer_sdpa", "sdpa as a layer of a Transformers model calls it", _layer("sdpa")),
        Peer("sdpa", "torch SDPA, its own choice of backend", _sdpa(None)),
        Peer("sdpa_flash", "torch SDPA, flash backend (FlashAttention-2)", _sdpa("FLASH_ATTENTION")),
        Peer("sdpa_cudnn", "torch SDPA, cuDNN backend", _sdpa("CUDNN_ATTENTION")),
        Peer("sdpa_efficient", "torch SDPA, memory-efficient backend", _sdpa("EFFICIENT_ATTENTION")),
        Peer("flex", "torch FlexAttention, compiled for each case", _flex),
        Peer("fa4", "flash-attn 4, called directly", _flash_attn(4)),
        Peer("fa3", "flash-attn 3, called directly", _flash_attn(3)),
        Peer("fa2", "flash-attn 2, called directly", _flash_attn(2)),
    )
}


def get_peer(name: str) -> Peer:
    """The peer of that name.

    Raises:
        ValueError: there is none; lists those there are.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}; the peers are: {', '.join(PEERS)}.")
    return PEERS[name]
