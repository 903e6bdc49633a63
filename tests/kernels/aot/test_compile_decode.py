"""The decoding kernels compile for every architecture, fit its shared memory, and hardly spill."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels: run without TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import decode_launch, launch, tiles
from hf_flash_plus.masks import AttentionMask

from .compiling import TARGETS, compile_launch, compiling_for, warm_up

BATCH, KEYS, HEADS, KEY_HEADS = 4, 4096, 32, 8
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256), (512, 512))


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _launches(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, pages: int, everything: bool, batch: int = BATCH
) -> dict[str, launch.Launch]:
    rows = 4 if everything else 1
    mask = AttentionMask(row_intervals=_meta(batch, rows, 2, dtype=torch.int32))
    extra = {}
    if everything:
        mask = AttentionMask(
            causal=True,
            window=(128, -1),
            row_intervals=mask.row_intervals,
            key_mask=_meta(batch, KEYS, dtype=torch.bool),
            bias=_meta(1, HEADS, rows, KEYS, dtype=dtype),
        )
        extra = dict(softcap=30.0, sinks=_meta(HEADS, dtype=dtype), alibi_slopes=_meta(HEADS, dtype=torch.float32))
    shape = (batch * KEYS // pages, pages) if pages else (batch, KEYS)
    inputs = AttentionInputs(
        _meta(batch, rows, HEADS, head_dim, dtype=dtype),
        _meta(*shape, KEY_HEADS, head_dim, dtype=dtype),
        _meta(*shape, KEY_HEADS, v_head_dim, dtype=dtype),
        0.1,
        mask,
        **extra,
    )
    call = launch.prepare(inputs)
    recipe = decode_launch.find_recipe(call.structure, HEADS // KEY_HEADS, rows, batch * KEY_HEADS, pages, 2)
    out = _meta(batch, rows, HEADS, v_head_dim, dtype=dtype)
    lse = _meta(batch, HEADS, rows, dtype=torch.float32)
    table = _meta(batch, KEYS // pages, dtype=torch.int32) if pages else None
    room = _meta(batch * KEY_HEADS * recipe.row_tiles * 8 * recipe.floats, dtype=torch.float32)
    space = decode_launch.Workspace(room, _meta(batch * KEY_HEADS * recipe.row_tiles, dtype=torch.int32))
    stateless = space._replace(counters=None)
    return {
        "split": decode_launch.decode_launch(call, recipe, out, lse, KEYS, 8, space, table),
        "parts": decode_launch.decode_launch(call, recipe, out, lse, KEYS, 8, stateless, table),
        "combine": decode_launch.combine_launch(call.structure, recipe, out, lse, KEY_HEADS, 8, stateless),
        "whole": decode_launch.decode_launch(call, recipe, out, None, KEYS, 1, None, table),
    }


@pytest.mark.parametrize("dims", DIMS, ids=lambda d: f"d{d[0]}v{d[1]}")
@pytest.mark.parametrize("arch", ("sm80", "sm90", "gfx942"))
def test_compiles(arch: str, dims: tuple[int, int]) -> None:
    with compiling_for(arch):
        for name, built in _launches(torch.bfloat16, *dims, pages=0, everything=False).items():
            result = compile_launch(built)
            assert result.shared <= TARGETS[arch].shared_memory, name
            assert result.spilled <= (64 if max(dims) <= 256 else 512), (name, result)


@pytest.mark.parametrize("batch", (16, 64))
def test_compiles_for_large_batches(batch: int) -> None:
    """Small heads have other tiles there."""
    with compiling_for("sm90"):
        for name, built in _launches(torch.bfloat16, 64, 64, pages=0, everything=False, batch=batch).items():
            result = compile_launch(built)
            assert result.shared <= TARGETS["sm90"].shared_memory // (1 if batch == 16 else 3), name
            assert result.spilled <= 64, (name, result)


@pytest.mark.parametrize("pages", (16, 256))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_pages_are_loaded_ahead(head_dim: int, pages: int) -> None:
    """As many tiles are on their way as of keys in one piece: the compiler must not give their stages to the table."""
    way = decode_launch._plain_way(tiles.Tile(16, 64, 4, 3))
    with compiling_for("sm90"), mock.patch.object(decode_launch, "_way", lambda *_: way):
        decode_launch.find_recipe.cache_clear()
        try:
            shared = [
                compile_launch(_launches(torch.bfloat16, head_dim, head_dim, size, everything=False)["whole"]).shared
                for size in (0, pages)
            ]
        finally:
            decode_launch.find_recipe.cache_clear()
    assert shared[1] >= shared[0] - 1024


@pytest.mark.parametrize("pages", (0, 16, 256))
@pytest.mark.parametrize("head_dim", (64, 128))
def test_keys_are_asked_for_before_queries_are_waited_for(head_dim: int, pages: int) -> None:
    """Queries are stored to shared memory where they are loaded, which waits for them."""
    way = decode_launch.Way(tiles.Tile(16, 64, 4, 3), 128, 64)
    with compiling_for("sm90"), mock.patch.object(decode_launch, "_way", lambda *_: way):
        decode_launch.find_recipe.cache_clear()
        try:
            built = _launches(torch.bfloat16, head_dim, head_dim, pages, everything=False)["parts"]
            result, ptx = compile_launch(built), warm_up(built).asm["ptx"]
        finally:
            decode_launch.find_recipe.cache_clear()
    assert result.spilled <= 64 and built.plan.options["PREFETCH"] == 128
    last = ptx.rindex("prefetch.global.L2")
    assert last < ptx.index("cp.async")
    assert pages or last < ptx.index("st.shared")  # numbers of pages go through shared memory


def test_measured_ways_compile() -> None:
    """The table's tiles fit the memory of a multiprocessor, and hardly spill."""
    with compiling_for("sm90"):
        # How the keys are split changes nothing of the kernel.
        for row_bytes, block_n, warps, stages, prefetch in sorted(
            {(key[0], *way[:4]) for key, way in decode_launch._SM90_WAYS.items()}
        ):
            way = decode_launch.Way(tiles.Tile(16, block_n, warps, stages), prefetch, block_n)
            with mock.patch.object(decode_launch, "_way", lambda *_, way=way: way):
                decode_launch.find_recipe.cache_clear()
                dim = row_bytes // 2
                for name, built in _launches(torch.bfloat16, dim, dim, 0, everything=False).items():
                    result = compile_launch(built)
                    assert result.shared <= TARGETS["sm90"].shared_memory and result.spilled <= 64, (name, way, result)
    decode_launch.find_recipe.cache_clear()


@pytest.mark.parametrize("arch", ("sm80", "sm90"))
def test_combination_starts_early_and_waits(arch: str) -> None:
    """On Hopper the second launch overlaps the first; only the two of them know of each other."""
    with compiling_for(arch):
        ptx = {
            name: warm_up(built).asm["ptx"]
            for name, built in _launches(torch.bfloat16, 128, 128, pages=0, everything=False).items()
        }
    hopper = arch == "sm90"
    assert ("griddepcontrol.launch_dependents" in ptx["parts"]) == hopper
    assert ("griddepcontrol.wait" in ptx["combine"]) == hopper
    assert not any("griddepcontrol" in ptx[name] for name in ("split", "whole"))


@pytest.mark.parametrize("pages", (0, 16, 256))
def test_compiles_with_every_feature(pages: int) -> None:
    with compiling_for("sm90"):
        result = compile_launch(_launches(torch.float16, 128, 128, pages, everything=True)["split"])
    assert result.shared <= TARGETS["sm90"].shared_memory and result.spilled <= 256, result


def test_compiles_in_fp32() -> None:
    with compiling_for("sm90"):
        result = compile_launch(_launches(torch.float32, 128, 128, 0, everything=False)["split"])
    assert result.shared <= TARGETS["sm90"].shared_memory and result.spilled <= 256, result
