"""Time tiles and splits of the decoding kernel on this GPU, beside torch's SDPA; what wins is written into
``decode_launch.py``.

Usage::

    python -m hf_flash_plus.kernels.tune_decode                                  # 1 to 64 rows, 512 to 32768 keys
    python -m hf_flash_plus.kernels.tune_decode --batch 1,16 --keys 2048 --head-dims 64 --add 256,8,2

Device time inside CUDA graphs, over copies of the cache that do not fit the L2 cache together. Each line is a shape:
the time that reading keys and values takes at the rate of a copy, torch's choice, ours as it is now, and the best
candidates as ``keys x warps x stages``, with the number of splits and how they are combined: by the program that comes
last, or in a second launch.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..inputs import AttentionInputs
from ..masks import CAUSAL
from . import decode_launch, launch, tiles
from .tiles import Tile

#: Keys, warps and stages.
CANDIDATES = ((32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 2), (128, 8, 3))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
_SHARED = 200 * 1024
_CACHED = 200 * 2**20  # more than the L2 cache holds


class Spec(NamedTuple):
    """One shape."""

    batch: int
    keys: int
    nheads: int
    nheads_k: int
    head_dim: int


def _inputs(spec: Spec, seed: int = 0) -> AttentionInputs:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shapes = ((1, spec.nheads), (spec.keys, spec.nheads_k), (spec.keys, spec.nheads_k))
    q, k, v = (
        torch.randn(spec.batch, rows, heads, spec.head_dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        for rows, heads in shapes
    )
    return AttentionInputs(q, k, v, spec.head_dim**-0.5, CAUSAL)


def _launches(inputs: AttentionInputs, tile: Tile, splits: int, two: bool) -> tuple[torch.Tensor, list[launch.Launch]]:
    """The output, and the launches that compute it."""
    call = launch.prepare(inputs)
    batch, _, nheads, _ = inputs.query.shape
    seqlen_k, nheads_k = inputs.key.shape[1:3]
    found = decode_launch.find_recipe(call.structure, nheads // nheads_k, batch * nheads_k, 0)
    recipe = found._replace(
        plan=decode_launch._decode_plan(call.structure, tile._replace(block_m=found.plan.tile.block_m), 0)
    )
    out, space = torch.empty_like(inputs.query), None
    programs = batch * nheads_k * recipe.row_tiles
    if splits > 1:
        counters = None if two else torch.zeros(programs, dtype=torch.int32, device="cuda")
        space = decode_launch.Workspace(torch.empty(programs * splits * recipe.floats, device="cuda"), counters)
    launches = [decode_launch.decode_launch(call, recipe, out, None, seqlen_k, splits, space, None)]
    if space is not None and two:
        launches.append(decode_launch.combine_launch(call.structure, recipe, out, None, nheads_k, splits, space))
    return out, launches


def compile_candidate(spec: Spec, tile: Tile, splits: int, two: bool) -> str:
    """Compile one candidate into Triton's cache; runs in a worker process. The error, or an empty string."""
    try:
        for built in _launches(_inputs(spec._replace(batch=1, keys=512)), tile, splits, two)[1]:
            built.plan.kernel.warmup(*built.arguments, grid=(built.n_programs,), **built.plan.options)
    except Exception as error:  # out of shared memory, a compiler failure: the table says so
        return f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return ""


def graph_us(calls: list[Callable[[], Any]], rounds: int) -> float:
    """Microseconds on the device of one of some calls, which take turns in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    turns = -(-24 // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(turns):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / (turns * len(calls)) * 1e3


def _sdpa(inputs: AttentionInputs) -> Callable[[], torch.Tensor]:
    q, k, v = (t.transpose(1, 2).contiguous() for t in (inputs.query, inputs.key, inputs.value))
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _run(launches: list[launch.Launch]) -> Callable[[], None]:
    def run() -> None:
        for built in launches:
            built.run()

    return run


def tune(spec: Spec, candidates: list[tuple[Tile, bool]], copy_gbs: float, rounds: int, best: int) -> None:
    """Time the candidates of one shape and print its line."""
    kv_bytes = 4 * spec.batch * spec.keys * spec.nheads_k * spec.head_dim
    caches = [_inputs(spec, seed) for seed in range(max(1, min(24, -(-_CACHED // kv_bytes))))]
    reference = _sdpa(caches[0])().transpose(1, 2)
    sdpa = graph_us([_sdpa(inputs) for inputs in caches], rounds)
    now = graph_us([lambda inputs=inputs: decode_launch.forward(inputs) for inputs in caches], rounds)  # type: ignore[misc]
    times: dict[str, float] = {}
    programs, cores = spec.batch * spec.nheads_k, tiles.device_info(caches[0].query.device).n_cores
    for tile, two in candidates:
        for splits in SPLITS:
            if splits > 1 and (splits * tile.block_n > spec.keys or programs * splits > 9 * cores):
                continue
            if splits == 1 and two:
                continue
            name = f"{tile.block_n}x{tile.num_warps}x{tile.num_stages} {splits}{' two' if two else ''}"
            built = [_launches(inputs, tile, splits, two) for inputs in caches]
            _run(built[0][1])()
            if (built[0][0] - reference).abs().max() > 2e-2:
                times[name + " WRONG"] = 0.0
                continue
            times[name] = graph_us([_run(launches) for _, launches in built], rounds)
    shown = "; ".join(f"{name}: {us:.2f}" for name, us in sorted(times.items(), key=lambda item: item[1])[:best])
    floor = kv_bytes / copy_gbs / 1e3
    shape = f"B{spec.batch} K{spec.keys} H{spec.nheads}/{spec.nheads_k} D{spec.head_dim}"
    print(f"{shape}: floor {floor:.2f}, sdpa {sdpa:.2f}, now {now:.2f}; {shown}", flush=True)


def main() -> None:
    from ..bench.timing import copy_bandwidth

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,4,16,64")
    parser.add_argument("--keys", default="512,2048,8192,32768")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--heads", default="32,8", help="query heads, key heads")
    parser.add_argument("--add", action="append", default=[], help="one more candidate: keys,warps,stages")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--best", type=int, default=6, help="candidates shown")
    args = parser.parse_args()
    nheads, nheads_k = map(int, args.heads.split(","))
    shapes = itertools.product(*(map(int, text.split(",")) for text in (args.batch, args.keys, args.head_dims)))
    specs = [Spec(batch, keys, nheads, nheads_k, dim) for batch, keys, dim in shapes]
    given = [*CANDIDATES, *(tuple(map(int, text.split(","))) for text in args.add)]
    usable: dict[int, list[tuple[Tile, bool]]] = {}
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(compile_candidate, spec, tile, 1 if two is None else 4, bool(two)): (spec, tile, two)
            for spec in {spec.head_dim: spec for spec in specs}.values()
            for tile in (Tile(16, *candidate) for candidate in given)
            if tile.num_stages * 4 * tile.block_n * spec.head_dim <= _SHARED
            for two in (None, False, True)  # one part, and several combined in one launch or two
        }
        for future, (spec, tile, two) in futures.items():
            error = future.result()
            if error:
                print(f"D{spec.head_dim} {tile}: {error}", flush=True)
            elif two is not None:
                usable.setdefault(spec.head_dim, []).append((tile, two))
    copy_gbs = copy_bandwidth(torch.device("cuda"))
    assert copy_gbs is not None
    for spec in specs:
        tune(spec, usable.get(spec.head_dim, []), copy_gbs, args.rounds, args.best)


if __name__ == "__main__":
    main()
