"""The provider ``torch_sdpa``: ``torch.nn.functional.scaled_dot_product_attention``, on CUDA and on the CPU.

Plain full and causal calls reach torch's fused kernels by flags alone; every other mask becomes a dense one, exact,
built once for each mask and remembered with it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import DTYPES, MAX_GRID, AttentionInputs, CallSignature
from ..masks import additive, is_own, visible
from .base import ALL_FEATURES, AttentionOutput, Provider, torch_is_deterministic
from .reference import alibi_bias, row_sinks

_MEMO = "_hf_flash_plus_visible"
_MEMO_OPEN = "_hf_flash_plus_visible_open"


class TorchSdpaProvider(Provider):
    name = "torch_sdpa"
    summary = "torch's scaled_dot_product_attention (its fused kernels where the mask allows)"
    differentiable = True
    reads_hidden_keys = True
    dtypes = frozenset(DTYPES)
    max_head_dim = 2**31
    features = ALL_FEATURES - {"softcap", "lse"}

    def version(self) -> str | None:
        return torch.__version__

    def extra_reasons(self, signature: CallSignature) -> list[str]:
        if signature.device_type == "meta":
            return ["serves real tensors, these are on the meta device"]
        if signature.alibi and signature.device_type != "cpu" and signature.dtype not in (torch.float32, torch.float64):
            return ["would round ALiBi's distances to half precision"]
        ordered = signature.device_type == "cpu" or torch_is_deterministic()
        if signature.deterministic and signature.needs_grad and not ordered:
            return ["adds up gradients in any order on GPUs unless torch.use_deterministic_algorithms(True)"]
        return []

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        q, k, v = inputs.query.transpose(1, 2), inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)
        batch, nheads, seqlen_q, head_dim = q.shape
        nheads_k = k.shape[1]
        scale = inputs.softmax_scale
        # SDPA's fused kernels multiply by the scale what they have masked with -inf: only a positive one keeps that.
        if scale == 0.0:
            q, scale = q * 0.0, 1.0
        elif scale < 0.0:
            q, scale = -q, -scale
        # A literal 0.0, which SDPA takes also where torch.compile(dynamic=True) has made the argument symbolic.
        dropout_p = inputs.dropout_p if inputs.dropout_p > 0.0 else 0.0
        is_causal = _flags_suffice(inputs)
        mask = None if is_causal else _dense(inputs)
        empty = None
        if inputs.sinks is not None:
            k, v, mask = _append_sink(inputs, k, v, mask, is_causal)
            is_causal = False
        elif mask is not None and not _zero_where_nothing_is_seen(q.device):
            mask, empty = _without_empty_rows(inputs, mask)
        if nheads != nheads_k and not _gqa_is_fused(q, mask):
            groups = nheads // nheads_k
            if seqlen_q == 1 and (mask is None or mask.shape[1] == 1):
                # One token: the query heads of a group become rows, and K and V need no copy.
                packed = q.reshape(batch, nheads_k, groups, head_dim)
                out = _zeroed(_sdpa(packed, k, v, mask, dropout_p=dropout_p, scale=scale), empty)
                return AttentionOutput(out.reshape(batch, 1, nheads, v.shape[3]))
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            nheads_k = nheads
        out = _sdpa(
            q,
            k,
            v,
            mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=True if nheads != nheads_k else False,  # noqa: SIM210 (symbolic, as above)
        )
        return AttentionOutput(_zeroed(out, empty).transpose(1, 2))


def _zero_where_nothing_is_seen(device: torch.device) -> bool:
    """Whether SDPA itself gives 0 and no gradients to rows that see nothing; on GPUs not all of its backends do."""
    return device.type == "cpu"


def _without_empty_rows(inputs: AttentionInputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A mask whose rows all see something, and which of them saw nothing before ``(..., seqlen_q, 1)``."""
    memo = inputs.mask.__dict__.get(_MEMO_OPEN)
    if memo is not None and memo[0] is mask:
        return memo[1], memo[2]
    if mask.dtype == torch.bool:
        empty = ~mask.any(-1, keepdim=True)
        filled = mask | empty
    else:
        empty = (mask == float("-inf")).all(-1, keepdim=True)
        filled = mask.masked_fill(empty, 0.0)
    if mask.dtype == torch.bool and not torch.compiler.is_compiling():  # for the other layers
        object.__setattr__(inputs.mask, _MEMO_OPEN, (mask, filled, empty))
    return filled, empty


def _zeroed(out: Tensor, empty: Tensor | None) -> Tensor:
    return out if empty is None else out.masked_fill(empty, 0.0)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """SDPA; on a GPU in parts of the batch where its kernels would go beyond what they can count."""
    if 0 in q.shape or 0 in k.shape:
        # torch 2.11 on GPUs returns None where cuDNN would compute gradients of an empty batch. Sums of nothing are 0,
        # and make the result depend on all three.
        nothing = q[..., :0].sum() + k[..., :0].sum() + v[..., :0].sum()
        if mask is not None and mask.requires_grad:  # a bias, or attention sinks
            nothing = nothing + mask[..., :0].sum().to(q.dtype)
        return q.new_zeros(*q.shape[:3], v.shape[3]) + nothing
    q, k, v = (_aligned(tensor) for tensor in (q, k, v))
    size = _batch_at_a_time(q)
    if q.shape[0] <= size:
        return _one_layout(_chosen(q, k, v, mask, **options))
    parts = []
    for begin in range(0, q.shape[0], size):
        part = slice(begin, begin + size)
        seen = mask if mask is None or mask.shape[0] == 1 else mask[part]
        out = _chosen(q[part], k[part], v[part], seen, **options)
        parts.append(_one_layout(out).transpose(1, 2))
    return torch.cat(parts).transpose(1, 2)  # rows before heads, as each part has it


#: Which backends torch may use is a setting of the process: calls of several threads take turns at changing it.
_SETTING = threading.Lock()


def _cudnn_is_right(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA's cuDNN backend may be asked. With a mask it may not (torch 2.11)

    * for gradients at key lengths that leave 64 of 128: they can be NaN (pytorch issue 196678);
    * for values of another head dimension than queries and keys: random calls in bf16, with 96 and 40, ended in a
      segmentation fault inside SDPA on an H200.

    Elsewhere it stays, being up to three times as fast with a mask as the memory-efficient backend, which serves then.
    """
    if mask is None:
        return True
    if q.shape[-1] != v.shape[-1]:
        return False
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return not (trained and k.shape[2] % 128 == 64)


def _chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """SDPA, without cuDNN where that is not right; compiled code is left alone."""
    on_cuda = q.device.type in CUDNN
    if not on_cuda or torch.compiler.is_compiling() or _cudnn_is_right(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    with _SETTING:
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        try:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor whose rows, heads and batch elements all lie at multiples of 16 bytes, where that is possible.

    The memory-efficient backend has no bf16 kernel for others (torch 2.11: "cutlassF: no kernel found to launch!"), but
    is chosen for them. A dimension of one element counts, too, whose stride says nothing and may be anything.
    """
    if tensor.device.type not in CUDNN or tensor.element_size() != 2 or torch.compiler.is_compiling():
        return tensor
    for dim in range(tensor.dim() - 1):
        if tensor.shape[dim] == 1 and tensor.stride(dim) % 8:
            tensor = tensor.squeeze(dim).unsqueeze(dim)  # the stride that a contiguous tensor would have
    if tensor.shape[-1] % 8:
        return tensor  # no such kernel is chosen for these
    odd = any(stride % 8 for size, stride in zip(tensor.shape, tensor.stride()[:-1]) if size > 1)
    return tensor.clone(memory_format=torch.contiguous_format) if odd or tensor.data_ptr() % 16 else tensor


#: Device types whose SDPA may be cuDNN's.
CUDNN = frozenset({"cuda"})


def _one_layout(out: Tensor) -> Tensor:
    """An output of SDPA whose gradient comes back with rows before heads, whoever makes it.

    torch keeps the plan of cuDNN's backward by the shapes and strides of query, key and value alone, and the plan has
    the strides of the gradient of its first call (2.11): calls that differ in those only would read it transposed, and
    return other gradients without a word. Compiled code is left alone, because the hook would break its graph.
    """
    if out.requires_grad and out.device.type in CUDNN and not torch.compiler.is_compiling():
        out.register_hook(_rows_before_heads)
    return out


def _rows_before_heads(gradient: Tensor) -> Tensor:
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def _batch_at_a_time(q: Tensor) -> int:
    """How many batch elements of q ``(batch, nheads, seqlen_q, head_dim)`` one call of SDPA may have.

    The batch is a dimension of the kernels' grids, which end at 65535 (pytorch issue 146704). The flash backward counts
    elements of its fp32 dq in 32 bits, with lengths rounded up to 128: beyond, it reads memory that is not there, and
    the CUDA context is lost.
    """
    if q.device.type != "cuda":
        return max(q.shape[0], 1)
    rows, dim = -(-q.shape[2] // 128) * 128, -(-q.shape[3] // 32) * 32
    return max(min(MAX_GRID, (2**31 - 1) // max(q.shape[1] * rows * dim, 1)), 1)


def _flags_suffice(inputs: AttentionInputs) -> bool:
    """Whether SDPA's own ``is_causal`` says all of the mask (it is top-left aligned, ours bottom-right)."""
    mask = inputs.mask
    if not mask.causal or mask.windowed or inputs.alibi_slopes is not None:
        return False
    if mask.row_intervals is not None or mask.key_mask is not None or mask.bias is not None:
        return False
    # An `if`, so that torch.compile with symbolic lengths decides here: SDPA takes no symbolic boolean.
    if inputs.seqlen_q != inputs.seqlen_k:  # noqa: SIM103
        return False
    return True


def _gqa_is_fused(q: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA's ``enable_gqa`` avoids copying K and V: on CUDA only for the flash kernels (no mask)."""
    return q.device.type == "cuda" and mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256


def _dense(inputs: AttentionInputs) -> Tensor | None:
    """The mask and every additive term as one dense mask for SDPA; None where nothing is masked."""
    seen = _remembered_visible(inputs)
    bias = additive(inputs.mask)
    if inputs.alibi_slopes is not None:
        alibi = alibi_bias(inputs)
        bias = alibi if bias is None else alibi + bias
    if bias is None:
        return seen
    if seen is not None:
        bias = bias.masked_fill(~seen, float("-inf"))
    # The CPU kernel takes an fp32 mask beside half-precision queries; the CUDA kernels want the query's dtype.
    dtype = inputs.query.dtype
    if inputs.query.device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    # Not every backend broadcasts a bias over the rows.
    return bias.to(dtype).expand(-1, -1, inputs.seqlen_q, -1)


def _remembered_visible(inputs: AttentionInputs) -> Tensor | None:
    """``visible(mask)``, kept on the mask so that the layers of a model share one: the same object reaches them all."""
    mask = inputs.mask
    plain = mask.row_intervals is None and mask.key_mask is None and mask.bias is None and not mask.windowed
    if plain and (not mask.causal or inputs.seqlen_q == 1):
        return None  # full; the last row of a bottom-right causal mask sees every key, too
    lengths, device = (inputs.seqlen_q, inputs.seqlen_k), inputs.query.device
    if torch.compiler.is_compiling() or not _countable(inputs):
        return visible(mask, *lengths, device)
    parts = (mask.row_intervals, mask.key_mask, mask.bias)
    key = (*lengths, device, *(None if part is None or part.is_inference() else part._version for part in parts))
    memo = mask.__dict__.get(_MEMO)
    if memo is None or memo[0] != key:
        memo = (key, visible(mask, *lengths, device))
        object.__setattr__(mask, _MEMO, memo)
    return memo[1]


def _countable(inputs: AttentionInputs) -> bool:
    """Whether what is worked out from a mask may be kept with it: the call's tensors are plain ones (a FakeTensor's
    mask must not serve others, nor the reverse), and torch counts their changes in place, or they are our own
    (``torch.inference_mode`` counts nothing, but nobody else knows those)."""
    mask = inputs.mask
    if type(inputs.query) not in (Tensor, torch.nn.Parameter):
        return False
    uncounted = [t for t in (mask.row_intervals, mask.key_mask, mask.bias) if t is not None and t.is_inference()]
    return not uncounted or is_own(mask)


def _append_sink(
    inputs: AttentionInputs, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention sinks as one more key, all zeros, whose only score is the sink: exact, with its gradient."""
    assert inputs.sinks is not None
    batch, nheads, seqlen_q = inputs.batch, inputs.nheads, inputs.seqlen_q
    k = F.pad(k, (0, 0, 0, 1))
    v = F.pad(v, (0, 0, 0, 1))
    if is_causal:
        mask = visible(inputs.mask, seqlen_q, inputs.seqlen_k, k.device)
    dtype = inputs.query.dtype if mask is None or mask.dtype == torch.bool else mask.dtype
    if k.device.type == "cpu":  # where SDPA takes an fp32 mask beside half-precision queries
        dtype = torch.promote_types(dtype, torch.float32)
    if mask is None:
        mask = torch.zeros((), dtype=dtype, device=k.device).expand(1, 1, seqlen_q, inputs.seqlen_k)
    elif mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=dtype, device=k.device).masked_fill(~mask, float("-inf"))
    sink = row_sinks(inputs.sinks).to(dtype).expand(batch, nheads, seqlen_q, 1)
    return k, v, torch.cat((mask.expand(batch, nheads, seqlen_q, -1), sink), dim=-1)
