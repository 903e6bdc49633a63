"""Hypothesis strategies: which calls are drawn, and how large."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from .cached import Cached
from .calls import LAYOUTS, PACKED_LAYOUTS, Call, Flash, FlashPacked, Masked, Structure, Varlen


@dataclass(frozen=True)
class Limits:
    """How large calls may be, and which structures they have.

    Attributes:
        lengths: favoured sequence lengths; any other up to the largest of them comes, too.
        dims: head dimensions; empty is any from 1 to 40.
        structures: 0 draws structures freely. Otherwise so many are made from ``seed`` and drawn from: on a GPU each
            costs the compilation of its kernels.
        part, parts: only every so manieth of these structures, for processes that share the work.
    """

    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    lengths: tuple[int, ...] = (0, 1, 2, 15, 16, 17, 33)
    dims: tuple[int, ...] = ()
    heads: int = 3
    batch: int = 3
    structures: int = 0
    seed: int = 0
    part: int = 0
    parts: int = 1


def _pairs(draw: Any, limits: Limits) -> tuple[int, int]:
    """Lengths of queries and keys: often equal, often at the edges of tiles."""
    one = st.one_of(st.sampled_from(limits.lengths), st.integers(0, max(limits.lengths)))
    seqlen_q = draw(one)
    return seqlen_q, seqlen_q if draw(st.booleans()) else draw(one)


@st.composite
def _free_structures(draw: Any, limits: Limits) -> Structure:
    dim = draw(st.sampled_from(limits.dims) if limits.dims else st.integers(1, 40))
    v_dim = dim if draw(st.booleans()) else draw(st.sampled_from(limits.dims) if limits.dims else st.integers(1, 40))
    window = st.one_of(st.just(-1), st.integers(0, max(limits.lengths)))
    return Structure(
        dtype=draw(st.sampled_from(limits.dtypes)),
        dim=dim,
        v_dim=v_dim,
        causal=draw(st.booleans()),
        window=(draw(window), draw(window)),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.7, 20.0))),
        scale=draw(st.sampled_from((None, None, 0.0, 1.0, -0.3, 4.0))),
        alibi=draw(st.sampled_from(("", "", "heads", "batch and heads"))),
        sinks=draw(st.sampled_from(("", "", "heads", "rows"))),
        lse=draw(st.booleans()),
        gradients=draw(st.booleans()),
    )


def _random_structure(limits: Limits, chance: random.Random) -> Structure:
    dim = chance.choice(limits.dims)
    return Structure(
        dtype=chance.choice(limits.dtypes),
        dim=dim,
        v_dim=chance.choice((dim, dim, *limits.dims)),
        causal=chance.random() < 0.5,
        window=(chance.choice((-1, -1, 33)), chance.choice((-1, -1, 7))),
        softcap=chance.choice((0.0, 0.0, 20.0)),
        scale=chance.choice((None, None, 0.5)),
        alibi=chance.choice(("", "", "", "heads", "batch and heads")),
        sinks=chance.choice(("", "", "heads", "rows")),
        lse=chance.random() < 0.5,
        gradients=chance.random() < 0.7,
    )


def structures(limits: Limits) -> st.SearchStrategy[Structure]:
    if not limits.structures:
        return _free_structures(limits)
    chance = random.Random(limits.seed)
    # The plain ones are what models use; hypothesis shrinks towards the first.
    dim = limits.dims[0]
    plain = [Structure(limits.dtypes[0], dim, dim), Structure(limits.dtypes[0], dim, dim, causal=True)]
    every = plain + [_random_structure(limits, chance) for _ in range(limits.structures)]
    return st.sampled_from(every[limits.part % len(every) :: limits.parts])


def _common(draw: Any, limits: Limits, layouts: dict[str, Any]) -> dict[str, Any]:
    layout = st.sampled_from(tuple(layouts))
    return {
        "seed": draw(st.integers(0, 2**16)),
        "heads_k": draw(st.integers(1, limits.heads)),
        "group": draw(st.integers(1, limits.heads)),
        "layouts": (draw(layout), draw(layout), draw(layout)),
    }


@st.composite
def flash(draw: Any, limits: Limits) -> Call:
    structure = draw(structures(limits))
    seqlen_q, seqlen_k = _pairs(draw, limits)
    batch = draw(st.integers(0, limits.batch))
    return Flash(structure, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **_common(draw, limits, LAYOUTS))


@st.composite
def flash_packed(draw: Any, limits: Limits) -> Call:
    structure = draw(structures(limits))
    seqlen_q, seqlen_k = _pairs(draw, limits)
    common = _common(draw, limits, LAYOUTS)
    kv_only = draw(st.booleans())
    if not kv_only:
        common["group"], seqlen_k = 1, seqlen_q
    structure = replace(structure, v_dim=structure.dim)
    batch = draw(st.integers(0, limits.batch))
    return FlashPacked(structure, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, kv_only=kv_only, **common)


@st.composite
def masked(draw: Any, limits: Limits) -> Call:
    structure = draw(structures(limits))
    seqlen_q, seqlen_k = _pairs(draw, limits)
    return Masked(
        structure,
        batch=draw(st.integers(0, limits.batch)),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        intervals=draw(st.integers(0, 2)),
        key_mask=draw(st.sampled_from((0, 0, 1, 2))),
        key_holes=draw(st.booleans()),
        bias=draw(st.sampled_from(("", "", "bool", "float"))),
        bias_shape=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        positions=draw(st.booleans()),
        **_common(draw, limits, LAYOUTS),
    )


@st.composite
def varlen(draw: Any, limits: Limits) -> Call:
    structure = draw(structures(limits))
    structure = replace(structure, alibi="heads" if structure.alibi else "", sinks="heads" if structure.sinks else "")
    pairs = [_pairs(draw, limits) for _ in range(draw(st.integers(0, 4)))]
    lengths_q, lengths_k = (tuple(pair[i] for pair in pairs) for i in (0, 1))
    return Varlen(
        structure,
        batch=1,
        seqlen_q=sum(lengths_q) + draw(st.sampled_from((0, 0, 3))),
        seqlen_k=sum(lengths_k) + draw(st.sampled_from((0, 0, 2))),
        lengths_q=lengths_q,
        lengths_k=lengths_k,
        spare=draw(st.sampled_from((0, 0, 5))),
        **_common(draw, limits, PACKED_LAYOUTS),
    )


@st.composite
def cached(draw: Any, limits: Limits) -> Call:
    structure = replace(draw(structures(limits)), gradients=False)
    batch = draw(st.integers(1, limits.batch))
    page = draw(st.sampled_from((0, 0, 4, 16)))
    slots = page * draw(st.integers(1, 4)) if page else draw(st.integers(1, max(limits.lengths)))
    new = draw(st.sampled_from((0, 1, 1, 3)))
    new = min(new, slots)
    used: Any = None
    kind = draw(st.sampled_from(("int", "tensor", "whole")))
    if kind == "int" or (new and kind == "whole"):
        used = draw(st.integers(0, slots - new))
    elif kind == "tensor":
        used = tuple(draw(st.integers(0, slots - new)) for _ in range(batch))
    rows = leftpad = ()
    if not page and draw(st.booleans()):
        rows = tuple(draw(st.permutations(range(batch + 2)))[:batch])
    if not page and draw(st.booleans()):
        leftpad = tuple(draw(st.integers(0, slots)) for _ in range(batch))
    half = draw(st.integers(0, structure.dim // 2)) if new and draw(st.booleans()) else 0
    return Cached(
        structure,
        batch=batch,
        seqlen_q=draw(st.sampled_from((1, 1, 2, 5, 17))),
        seqlen_k=slots,
        used=used,
        new=new,
        rows=rows,
        leftpad=leftpad,
        page=page,
        rotary_half=half,
        interleaved=draw(st.booleans()),
        **_common(draw, limits, LAYOUTS),
    )


KINDS = {"flash": flash, "flash_packed": flash_packed, "masked": masked, "varlen": varlen, "cached": cached}
