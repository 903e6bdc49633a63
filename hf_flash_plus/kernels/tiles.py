"""Tile sizes of the kernels: a table by architecture and head dimension, and a bounded choice by sequence length.

No autotuning happens on a user's call. ``kernels/tune.py`` times candidates; what it finds is written down here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

KINDS = ("forward", "dq", "dkdv")


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, and stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class DeviceInfo(NamedTuple):
    """What the choice of tiles needs to know of a device: its row of :data:`TABLE`, and its multiprocessors."""

    arch: str
    n_cores: int

    @property
    def fp32_precision(self) -> str:
        """How fp32 matrices are multiplied at fp32 accuracy: three TF32 products on NVIDIA, natively elsewhere."""
        return "tf32x3" if self.arch.startswith("sm") else "ieee"


class TileKey(NamedTuple):
    """What a tile is chosen by: kernel, architecture, fp32 or half, padded head dimension, and three classes.

    ``masked`` calls (row intervals, key masks, biases, ALiBi) and ``dropout`` calls need more registers in a tile;
    ``rows`` is from :func:`row_class`.
    """

    kind: str
    arch: str
    fp32: bool
    head_dim: int
    rows: int
    masked: bool
    dropout: bool


class Choice(NamedTuple):
    """The tiles of one kernel and head dimension: for calls whose mask is flags alone, for other masks, for few rows,
    and for dropout."""

    plain: Tile
    masked: Tile
    small: Tile
    dropout: Tile


def _choice(plain: Tile, masked: Tile | None = None, small: Tile | None = None, dropout: Tile | None = None) -> Choice:
    masked = masked or plain
    return Choice(plain, masked, small or masked, dropout or masked)


# Why these: the largest tiles that (almost) do not spill registers, read off ptxas (tests/kernels/aot repeats that);
# the order between those that do not was measured with kernels/tune.py where a comment says so.
# Two-byte elements. {architecture: {kernel: {largest padded head dimension: Choice}}}
# Timed on an H200 (4 x 4096 and 32 x 512 tokens, causal and full): 64x64 with 4 warps leaves room for a second program
# on a multiprocessor, whose products run beside the first one's exponentials.
_SM90 = {
    "forward": {
        64: _choice(Tile(64, 64, 4, 3)),
        128: _choice(Tile(64, 64, 4, 3), dropout=Tile(128, 64, 8, 3)),
        256: _choice(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
        512: _choice(Tile(32, 32, 8, 1)),
    },
    "dq": {
        64: _choice(Tile(64, 64, 4, 3)),
        128: _choice(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), dropout=Tile(128, 64, 8, 3)),
        256: _choice(Tile(64, 32, 8, 2)),
        512: _choice(Tile(32, 32, 8, 1)),
    },
    "dkdv": {
        64: _choice(Tile(64, 64, 4, 3), dropout=Tile(64, 64, 4, 2)),
        128: _choice(Tile(32, 128, 8, 3), None, Tile(64, 64, 8, 2), Tile(32, 128, 8, 2)),
        256: _choice(Tile(32, 32, 8, 2)),
        512: _choice(Tile(16, 32, 8, 1)),
    },
}
# Compiled only, never timed. The compiler pipelines dkdv's loads through registers there, and spills them.
_SM100 = {
    **_SM90,
    "dkdv": {**_SM90["dkdv"], 64: _choice(Tile(64, 128, 8, 1)), 128: _choice(Tile(64, 128, 8, 1))},
}
# 163 KiB of shared memory, and products that read it into registers first: shorter key tiles than on sm90.
_SM80 = {
    "forward": {
        64: _choice(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        128: _choice(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        256: _choice(Tile(64, 64, 8, 2)),
        512: _choice(Tile(32, 32, 8, 1)),
    },
    "dq": {
        64: _choice(Tile(128, 64, 8, 3), None, Tile(64, 64, 4, 2)),
        128: _choice(Tile(64, 64, 8, 2), None, Tile(64, 32, 4, 2)),
        256: _choice(Tile(32, 32, 4, 1)),
        512: _choice(Tile(32, 16, 8, 1)),
    },
    "dkdv": {
        64: _choice(Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
        128: _choice(Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: _choice(Tile(32, 32, 8, 1)),
        512: _choice(Tile(16, 32, 8, 1)),
    },
}
# 99 KiB (8.6, 8.9, 12.x): one stage less, or half the keys, where sm80's tiles do not fit.
_SM86 = {
    "forward": {**_SM80["forward"], 256: _choice(Tile(64, 32, 4, 2))},
    "dq": {**_SM80["dq"], 512: _choice(Tile(16, 16, 4, 1))},
    "dkdv": {**_SM80["dkdv"], 512: _choice(Tile(16, 16, 8, 1))},
}
# 64 KiB, wavefronts of 64 and 512 registers: 4 warps and one stage (the compiler pipelines through registers).
_CDNA = {
    "forward": {
        64: _choice(Tile(128, 64, 4, 1), None, Tile(64, 64, 4, 1)),
        128: _choice(Tile(128, 64, 4, 1), None, Tile(64, 64, 4, 1)),
        256: _choice(Tile(64, 32, 4, 1)),
        512: _choice(Tile(32, 16, 4, 1)),
    },
    "dq": {
        64: _choice(Tile(64, 64, 4, 1)),
        128: _choice(Tile(64, 32, 4, 1)),
        256: _choice(Tile(32, 32, 4, 1)),
        512: _choice(Tile(16, 16, 4, 1)),
    },
    "dkdv": {
        64: _choice(Tile(32, 64, 4, 1)),
        128: _choice(Tile(32, 64, 4, 1)),
        256: _choice(Tile(16, 32, 4, 1)),
        512: _choice(Tile(16, 16, 4, 1)),
    },
}
_SMALLEST = {512: _choice(Tile(16, 16, 4, 1))}
# fp32: twice the bytes, and three products for one.
_FP32_NVIDIA = {
    "forward": {
        64: _choice(Tile(64, 32, 4, 2)),
        128: _choice(Tile(64, 32, 8, 2)),
        256: _choice(Tile(32, 32, 8, 1)),
        512: _choice(Tile(16, 16, 4, 1)),
    },
    "dq": {
        64: _choice(Tile(32, 32, 4, 1)),
        128: _choice(Tile(32, 32, 8, 1)),
        256: _choice(Tile(16, 16, 4, 1)),
        512: _choice(Tile(16, 16, 8, 1)),
    },
    "dkdv": {
        64: _choice(Tile(32, 32, 4, 1)),
        128: _choice(Tile(32, 32, 8, 1)),
        256: _choice(Tile(16, 16, 8, 1)),
        512: _choice(Tile(16, 16, 8, 1)),
    },
}
_FP32_SMALL = {
    "forward": {64: _choice(Tile(64, 32, 4, 1)), 128: _choice(Tile(32, 32, 4, 1)), **_SMALLEST},
    "dq": {64: _choice(Tile(32, 32, 4, 1)), 128: _choice(Tile(32, 16, 4, 1)), **_SMALLEST},
    "dkdv": {64: _choice(Tile(32, 32, 4, 1)), 128: _choice(Tile(16, 32, 4, 1)), **_SMALLEST},
}
_INTERPRETER = {kind: {512: _choice(Tile(32, 32, 4, 1))} for kind in KINDS}
#: {architecture: (half precision, fp32)}; "default" is any other, and must fit everywhere.
TABLE = {
    "sm80": (_SM80, _FP32_NVIDIA),
    "sm86": (_SM86, _FP32_SMALL),
    "sm90": (_SM90, _FP32_NVIDIA),
    "sm100": (_SM100, _FP32_NVIDIA),
    "gfx90a": (_CDNA, _FP32_SMALL),
    "gfx942": (_CDNA, _FP32_SMALL),
    "default": (_CDNA, _FP32_SMALL),
    "interpreter": (_INTERPRETER, _INTERPRETER),
}

_override: dict[str, Tile] = {}


@contextmanager
def override(**tiles: Tile) -> Iterator[None]:
    """Use these tiles, by kind (``forward=Tile(...)``, ``dq=``, ``dkdv=``), inside a ``with`` block; for tuning."""
    unknown = set(tiles) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kernel kinds {sorted(unknown)}; the kinds are {', '.join(KINDS)}.")
    before = dict(_override)
    _override.update(tiles)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def overridden() -> bool:
    """Whether an :func:`override` is in force, so that remembered choices must not be used."""
    return bool(_override)


@cache
def device_info(device: torch.device) -> DeviceInfo:
    """The :class:`DeviceInfo` of a device; architectures without a row of their own get ``"default"``."""
    if device.type == "cpu":
        return DeviceInfo("interpreter", 1)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    elif properties.major in (8, 9, 10) and properties.minor in (0, 3):
        name = f"sm{properties.major}0"
    else:
        name = "sm86"  # 8.6, 8.9 and 12.x have 99 KiB of shared memory
    return DeviceInfo(name if name in TABLE else "default", properties.multi_processor_count)


def padded(head_dim: int) -> int:
    """The power of two that a head dimension is padded to inside kernels; matrix products need at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def row_class(seqlen_q: int, n_heads: int, device: DeviceInfo) -> int:
    """16 for a query of at most 16 rows; 64 for one of at most 64, or where larger tiles would leave the device
    partly idle; else 128. The only dependence of tiles on lengths: three variants of a kernel at most."""
    if seqlen_q <= 16:
        return 16
    if seqlen_q <= 64 or -(-seqlen_q // 128) * n_heads < device.n_cores:
        return 64
    return 128


def without_wgmma(kind: str, tile: Tile) -> Tile:
    """A smaller tile: Hopper's products of whole warpgroups begin at 64 rows (keys, where keys come first)."""
    if kind == "dkdv":
        return tile._replace(block_n=min(tile.block_n, 32), num_warps=4, num_stages=min(tile.num_stages, 2))
    return tile._replace(block_m=min(tile.block_m, 32), num_warps=4, num_stages=min(tile.num_stages, 2))


def select(key: TileKey) -> Tile:
    """The tile for a key: the override, else the table's, with no more query rows than a short query has."""
    if key.kind in _override:
        return _override[key.kind]
    by_dim = TABLE[key.arch][key.fp32][key.kind]
    choice = by_dim[min(dim for dim in by_dim if dim >= key.head_dim)]
    tile = choice.dropout if key.dropout else choice.masked if key.masked else choice.plain
    if key.rows < 128:
        small = choice.small
        if small.block_m * small.block_n < tile.block_m * tile.block_n:
            tile = small
    if key.rows == 16:
        tile = tile._replace(block_m=16, num_warps=min(tile.num_warps, 4))
    return tile
