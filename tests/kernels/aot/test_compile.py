"""Every kernel compiles for every architecture in the tile tables, fits its shared memory, and hardly spills.

No GPU is needed. A representative set runs by default; ``HF_FLASH_PLUS_AOT=full`` compiles everything (about an hour
on two cores).
"""

from __future__ import annotations

import itertools
import os
from typing import NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import tiles
from hf_flash_plus.masks import AttentionMask

from .compiling import TARGETS, call, compile_launch, compiling_for, launches, warm_up

#: Bytes of registers spilled (on NVIDIA: the whole stack) that a thread may have. Some dozens outside the inner loops
#: cost nothing, and one kernel's number differs by a factor of 3 between Triton 3.6 and 3.9; a slip of the tile table
#: or of a kernel shows as 500 to 8000. For many features at once the bound keeps only accidents out.
SPILLS = {"plain": 320, "intervals": 320, "bias": 448, "everything": 1600}
BATCH, SEQLEN, HEADS = 2, 4096, 32


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def features(name: str, dtype: torch.dtype, head_dim: int, v_head_dim: int) -> AttentionInputs:
    """A call with the features that share a bound."""
    if name == "plain":
        return call(dtype, head_dim, v_head_dim)
    if name == "intervals":
        return call(dtype, head_dim, v_head_dim, mask=AttentionMask(row_intervals=_meta(BATCH, SEQLEN, 2)))
    if name == "bias":
        return call(dtype, head_dim, v_head_dim, mask=AttentionMask(bias=_meta(1, HEADS, SEQLEN, SEQLEN, dtype=dtype)))
    mask = AttentionMask(
        window=(128, 128),
        row_intervals=_meta(BATCH, SEQLEN, 2),
        key_mask=_meta(BATCH, SEQLEN, dtype=torch.bool),
        key_holes=_meta(BATCH),
        bias=_meta(BATCH, 1, 1, SEQLEN, dtype=torch.bool),
        row_positions=_meta(BATCH, SEQLEN),
    )
    return call(
        dtype,
        head_dim,
        v_head_dim,
        mask=mask,
        softcap=30.0,
        alibi_slopes=_meta(HEADS, dtype=torch.float32),
        sinks=_meta(HEADS, dtype=dtype),
        dropout_p=0.1,
        dropout_seed=_meta(1, dtype=torch.int64),
    )


class Variant(NamedTuple):
    arch: str
    features: str
    dtype: torch.dtype
    head_dim: int
    v_head_dim: int

    def __str__(self) -> str:
        dims = f"{self.head_dim}" + f"v{self.v_head_dim}" * (self.v_head_dim != self.head_dim)
        return f"{self.arch}-{self.features}-{str(self.dtype)[6:]}-d{dims}"


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FULL = [
    Variant(arch, name, dtype, *dims)
    for arch, name, dtype, dims in itertools.product(
        TARGETS, SPILLS, (BF16, FP16, FP32), ((40, 40), (64, 64), (128, 128), (192, 128), (256, 256), (512, 512))
    )
]
REPRESENTATIVE = [
    *(Variant(arch, "plain", BF16, 128, 128) for arch in TARGETS),
    *(Variant(arch, "intervals", FP16, 64, 64) for arch in ("sm80", "sm90", "gfx942")),
    *(Variant(arch, "everything", BF16, 64, 64) for arch in ("sm90", "gfx90a")),
    *(Variant(arch, "plain", FP32, 64, 64) for arch in ("sm90", "gfx942")),
    *(Variant(arch, "plain", BF16, 512, 512) for arch in ("sm86", "gfx90a")),
    Variant("sm90", "plain", BF16, 192, 128),
    Variant("sm90", "intervals", BF16, 128, 128),
    Variant("sm90", "bias", BF16, 64, 64),
]


@pytest.mark.parametrize("variant", FULL if os.environ.get("HF_FLASH_PLUS_AOT") == "full" else REPRESENTATIVE, ids=str)
def test_compiles(variant: Variant) -> None:
    limit = TARGETS[variant.arch].shared_memory
    with compiling_for(variant.arch):
        inputs = features(*variant[1:])
        for name, built in launches(inputs, bias_grad=variant.features == "bias").items():
            compiled = compile_launch(built)
            assert compiled.shared <= limit, f"{name} takes {compiled.shared} bytes of shared memory, there are {limit}"
            if not (variant.dtype == FP32 or variant.head_dim > 256):
                bound = SPILLS[variant.features]
                assert compiled.spilled <= bound, f"{name} spills {compiled.spilled} bytes, allowed are {bound}"


@pytest.mark.parametrize("seqlen", [1, 48, 100], ids="seqlen{}".format)
def test_short_sequences_compile(seqlen: int) -> None:
    """The tiles for few rows."""
    with compiling_for("sm90"):
        for built in launches(call(BF16, 64, seqlen=seqlen)).values():
            assert compile_launch(built).spilled <= SPILLS["plain"]


def test_lengths_do_not_recompile() -> None:
    """Sequence lengths, batch sizes, scales and windows are runtime values."""
    with compiling_for("sm90"):
        kernels = set()
        for seqlen, batch, window in ((1000, 3, 7), (1001, 1, 16), (4096, 64, 1000)):
            inputs = call(BF16, 64, batch=batch, seqlen=seqlen, mask=AttentionMask(causal=True, window=(window, 0)))
            # Rows of other calls lie as far apart; only the strides of batch elements differ, all multiples of 16.
            built = launches(inputs)["forward"]
            kernels.add(warm_up(built).hash)
    assert len(kernels) <= 2  # one for each class of sizes (tiles.row_class)


@pytest.mark.parametrize("name", SPILLS)
def test_direct_launch(name: str) -> None:
    """What Launch.run passes to a compiled kernel, beside Triton's own look-up, is what Triton itself would pass; and
    its key tells apart all that Triton compiles anew for."""
    with compiling_for("sm90"):
        inputs = features(name, BF16, 64, 64)
        for built in launches(inputs, bias_grad=name == "bias").values():
            kernel, plan = built.plan.kernel, built.plan
            *_, binder = kernel.device_caches[list(TARGETS).index("sm90")]
            bound, *_ = binder(*built.arguments, **{"debug": False, "instrumentation_mode": "", **plan.options})
            assert list(bound.values()) == [*built.arguments, *plan.constexprs]
            assert plan.reusable
            assert all(t is None or isinstance(t, torch.Tensor) for t in built.arguments[: built.tensors])
            assert not any(isinstance(t, torch.Tensor) for t in built.arguments[built.tensors :])
            strides = set(built.key[1:])
            specialized = [
                value
                for parameter, value in zip(kernel.params, built.arguments)
                if isinstance(value, int) and not parameter.do_not_specialize
            ]
            assert specialized and strides.issuperset(specialized)


def test_keys_of_strides() -> None:
    """A key cache that grows by one token a step reuses what was compiled; another alignment does not."""
    with compiling_for("sm90"):
        plan = launches(call(BF16, 64))["forward"].plan

        def key(seqlen: int, row: int = 512) -> tuple[int, ...]:
            return (0, seqlen * row, row, 64)

        plan.remember(key(100), "compiled")
        assert plan.find(key(100)) == plan.find(key(101)) == "compiled"
        assert plan.find((1, *key(100)[1:])) is None
        assert plan.find(key(101, row=520)) is None


def test_tables_are_complete() -> None:
    """Every architecture has a tile for every kernel, dtype and head dimension, in every class."""
    for arch, kind, fp32 in itertools.product(tiles.TABLE, tiles.KINDS, (False, True)):
        for head_dim, rows, masked in itertools.product((16, 32, 64, 128, 256, 512), (16, 64, 128), (False, True)):
            tile = tiles.select(tiles.TileKey(kind, arch, fp32, head_dim, rows, masked, False))
            assert min(tile.block_m, tile.block_n) >= 16


def test_override() -> None:
    tile = tiles.Tile(16, 16, 4, 1)
    key = tiles.TileKey("dq", "sm90", False, 64, 128, False, False)
    with tiles.override(dq=tile):
        assert tiles.select(key) == tile
    assert tiles.select(key) != tile
    with pytest.raises(ValueError, match="forward, dq, dkdv"), tiles.override(backward=tile):
        pass
