"""What providers are asked: one compact call per feature, told twice, as a call of a public function and densely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import interface, kvcache
from ..masks import AttentionMask
from .oracle import Answer, Dense

BATCH, HEADS, HEADS_K, DIM = 2, 4, 2, 64
#: No multiple of any tile size, so that every edge of a kernel is walked.
SEQLEN, LONGER = 150, 203


@dataclass(frozen=True)
class Feature:
    """One row of the matrix.

    Attributes:
        name: as printed.
        make: the call, in fp32 on the CPU, from torch's generator.
        ask: calls a public function on the tensors of a :class:`Dense` and returns its answer, shaped as the oracle's.
        gradients: whether the backward is checked, too. (Not where its kernels would be those of another row but for a
            detail that the forward shares: most of the time of a first check goes to compiling them.)
        core: also asked in the other dtypes.
    """

    name: str
    make: Callable[[], Dense]
    ask: Callable[[Dense], Answer | Tensor]
    gradients: bool = True
    core: bool = False


def draw(seqlen_q: int = SEQLEN, seqlen_k: int = SEQLEN, **changes: Any) -> Dense:
    """Random q, k, v; ``batch``, ``heads``, ``heads_k``, ``dim``, ``v_dim`` and all fields of :class:`Dense`."""
    size = {"batch": BATCH, "heads": HEADS, "heads_k": HEADS_K, "dim": DIM}
    size |= {name: changes.pop(name) for name in list(changes) if name in size}
    v_dim = changes.pop("v_dim", size["dim"])
    return Dense(
        torch.randn(size["batch"], seqlen_q, size["heads"], size["dim"]),
        torch.randn(size["batch"], seqlen_k, size["heads_k"], size["dim"]),
        torch.randn(size["batch"], seqlen_k, size["heads_k"], v_dim),
        **changes,
    )


def grid(seqlen_q: int = SEQLEN, seqlen_k: int = SEQLEN) -> tuple[Tensor, Tensor]:
    """``(place, key)``: the key on each row's diagonal (bottom right), and the index of each key."""
    place = torch.arange(seqlen_q)[:, None] + (seqlen_k - seqlen_q)
    return place, torch.arange(seqlen_k)[None]


def causal(seqlen_q: int = SEQLEN, seqlen_k: int = SEQLEN) -> Tensor:
    place, key = grid(seqlen_q, seqlen_k)
    return key <= place


def _flash(**options: Any) -> Callable[[Dense], Tensor]:
    def ask(call: Dense) -> Tensor:
        out: Tensor = interface.flash_attn_func(
            call.q,
            call.k,
            call.v,
            softmax_scale=call.scale,
            softcap=call.softcap,
            alibi_slopes=call.slopes,
            s_aux=call.sinks,
            **options,
        )
        return out

    return ask


def _masked(mask: Callable[[Dense], AttentionMask]) -> Callable[[Dense], Tensor]:
    def ask(call: Dense) -> Tensor:
        out: Tensor = interface.attention(
            call.q, call.k, call.v, mask(call), softmax_scale=call.scale, softcap=call.softcap, s_aux=call.sinks
        )
        return out

    return ask


# --- masks that need more than flags ---

LEFT, RIGHT = (0, 37), (29, 0)  # padding of the two rows of a batch


def _padded() -> Dense:
    _, key = grid()
    real = torch.stack([(key[0] >= left) & (key[0] < SEQLEN - right) for left, right in zip(LEFT, RIGHT)])
    return draw(seen=real[:, None, None, :] & causal())


def _padding_intervals(call: Dense) -> AttentionMask:
    rows = torch.arange(SEQLEN, device=call.q.device).expand(BATCH, -1)
    first = torch.tensor(LEFT, device=rows.device)[:, None].expand(-1, SEQLEN)
    last = torch.tensor([SEQLEN - right for right in RIGHT], device=rows.device)[:, None]
    return AttentionMask(row_intervals=torch.stack((first, torch.minimum(rows + 1, last)), dim=-1).int())


def _holes() -> Dense:
    keep = torch.rand(BATCH, SEQLEN) < 0.7
    keep[0, 64:128] = False  # a whole tile to skip
    return draw(seen=keep[:, None, None, :])


def _key_mask(call: Dense) -> AttentionMask:
    assert call.seen is not None
    return AttentionMask(key_mask=call.seen[:, 0, 0, :])


LENGTHS = (61, 0, 1, 88)


def _packed(is_causal: bool) -> Callable[[], Dense]:
    def make() -> Dense:
        owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        seen = owner[:, None] == owner[None]
        return draw(batch=1, seen=(seen & causal() if is_causal else seen)[None, None])

    return make


def _varlen(is_causal: bool) -> Callable[[Dense], Tensor]:
    def ask(call: Dense) -> Tensor:
        cu = torch.tensor((0, *LENGTHS), device=call.q.device).cumsum(0, dtype=torch.int32)
        longest = max(LENGTHS)
        out: Tensor = interface.flash_attn_varlen_func(
            call.q[0], call.k[0], call.v[0], cu, cu, longest, longest, causal=is_causal
        )
        return out[None]

    return ask


def _window(left: int, right: int) -> Dense:
    place, key = grid()
    seen = (key >= place - left) & (key <= place + right)
    return draw(seen=seen[None, None])


def _alibi() -> Dense:
    place, key = grid()
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(HEADS)])
    return draw(seen=causal()[None, None], slopes=slopes, distance=(place - key).abs()[None, None])


# --- caches: forward only, one or a few new tokens ---

USED, SLOTS, PAGE = (97, 140), 192, 64


def _cached(rows: int) -> Callable[[], Dense]:
    """``rows`` new tokens behind the keys in use; slots behind those hold NaN, as memory that nobody wrote may."""

    def make() -> Dense:
        last = torch.tensor(USED)[:, None] + torch.arange(rows)  # the new token's own place
        seen = torch.arange(SLOTS) <= last[..., None]
        call = draw(rows, SLOTS, seen=seen[:, None])
        for b, used in enumerate(USED):
            call.k[b, used + rows :], call.v[b, used + rows :] = float("nan"), float("nan")
        return call

    return make


def _with_kvcache(rows: int, paged: bool) -> Callable[[Dense], Tensor]:
    def ask(call: Dense) -> Tensor:
        used = torch.tensor(USED, dtype=torch.int32, device=call.q.device)
        caches, new = [], []
        for full in (call.k, call.v):
            full = full.detach()
            new.append(torch.stack([full[b, n : n + rows] for b, n in enumerate(USED)]))
            cache = full.clone()
            for b, n in enumerate(USED):
                cache[b, n:] = float("nan")  # the function itself must write the new tokens
            caches.append(cache)
        table = None
        if paged:
            pages = SLOTS // PAGE
            table = torch.arange(BATCH * pages, device=used.device).flip(0).view(BATCH, pages).int()
            caches = [c.unflatten(1, (pages, PAGE)).flatten(0, 1).flip(0).contiguous() for c in caches]
        out: Tensor = kvcache.flash_attn_with_kvcache(
            call.q, caches[0], caches[1], new[0], new[1], cache_seqlens=used, block_table=table, causal=True
        )
        return out

    return ask


def _lse(call: Dense) -> Answer:
    out, lse, _ = interface.flash_attn_func(call.q, call.k, call.v, causal=True, return_attn_probs=True)
    return Answer(out, lse)


FEATURES: Sequence[Feature] = (
    Feature("full", draw, _flash()),
    Feature("causal", lambda: draw(seen=causal()[None, None]), _flash(causal=True), core=True),
    Feature(
        "causal, more keys than queries",
        lambda: draw(SEQLEN, LONGER, seen=causal(SEQLEN, LONGER)[None, None]),
        _flash(causal=True),
        gradients=False,
    ),
    Feature(
        "causal, rows that see nothing",
        lambda: draw(LONGER, SEQLEN, seen=causal(LONGER, SEQLEN)[None, None]),
        _flash(causal=True),
    ),
    Feature("sliding window", lambda: _window(40, 0), _flash(causal=True, window_size=(40, -1))),
    Feature("two-sided window", lambda: _window(33, 17), _flash(window_size=(33, 17)), gradients=False),
    Feature("padded batch", _padded, _masked(_padding_intervals), core=True),
    Feature("padding with holes", _holes, _masked(_key_mask)),
    Feature("packed (varlen)", _packed(False), _varlen(False), gradients=False),
    Feature("packed, causal", _packed(True), _varlen(True), core=True),
    Feature(
        "boolean mask",
        lambda: draw(seen=torch.rand(BATCH, 1, SEQLEN, SEQLEN) < 0.5),
        _masked(lambda call: AttentionMask(bias=call.seen)),
    ),
    Feature(
        "bias, with its gradient",
        lambda: draw(bias=torch.randn(1, HEADS, SEQLEN, SEQLEN)),
        _masked(lambda call: AttentionMask(bias=call.bias)),
    ),
    Feature("ALiBi", _alibi, _flash(causal=True)),
    Feature("softcap", lambda: draw(softcap=5.0, scale=0.5), _flash()),
    Feature(
        "sinks, with their gradient",
        lambda: draw(seen=causal()[None, None], sinks=torch.randn(HEADS)),
        _flash(causal=True),
    ),
    Feature("one key head (MQA)", lambda: draw(heads_k=1), _flash()),
    Feature("head dim 128", lambda: draw(dim=128, seen=causal()[None, None]), _flash(causal=True), core=True),
    Feature("head dims 96 and 32", lambda: draw(dim=96, v_dim=32), _flash(), gradients=False),
    Feature("logits in the hundreds", lambda: draw(scale=20.0), _flash()),
    Feature("log-sum-exp", lambda: draw(seen=causal()[None, None]), _lse, gradients=False),
    Feature("decoding, KV cache", _cached(1), _with_kvcache(1, False), gradients=False, core=True),
    Feature("drafted tokens, KV cache", _cached(5), _with_kvcache(5, False), gradients=False),
    Feature("decoding, paged cache", _cached(1), _with_kvcache(1, True), gradients=False),
)
