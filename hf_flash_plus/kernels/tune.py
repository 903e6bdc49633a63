"""Time tile candidates of the kernels on this GPU, beside torch's SDPA; what wins is written into ``tiles.py``.

Usage::

    python -m hf_flash_plus.kernels.tune                        # the default shapes
    python -m hf_flash_plus.kernels.tune --shape 4,4096,32,8,128 --masks causal,packed --kinds dkdv
    python -m hf_flash_plus.kernels.tune --dtype float32 --shape 4,2048,16,16,64 --add 64,32,8,1

Candidates are compiled first, in parallel processes; then each is timed in interleaved rounds, and the table shows
the median with TFLOP/s (causal counts half the operations), registers spilled and shared memory. ``*`` marks the tile
that ``tiles.py`` chooses now.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..inputs import AttentionInputs
from ..masks import AttentionMask
from . import launch, tiles
from .tiles import Tile

DEFAULT_SHAPES = ("4,4096,16,16,128", "4,4096,32,32,64", "4,4096,32,8,128", "32,512,16,16,128")

#: Candidates by kernel and padded head dimension.
CANDIDATES: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        64: (
            Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 128, 4, 2),
            Tile(64, 64, 4, 3), Tile(64, 128, 4, 3),
        ),
        128: (
            Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 4, 3),
            Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(64, 64, 4, 3),
        ),
        256: (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 4, 2)),
        512: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 64, 8, 1)),
    },
    "dq": {
        64: (
            Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2),
            Tile(64, 128, 4, 2),
        ),
        128: (
            Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2),
            Tile(128, 32, 8, 3), Tile(128, 128, 8, 1),
        ),
        256: (Tile(64, 32, 8, 2), Tile(64, 64, 8, 1), Tile(32, 32, 4, 1), Tile(64, 32, 8, 1)),
        512: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 4, 1)),
    },
    "dkdv": {
        64: (
            Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
            Tile(128, 64, 8, 2), Tile(32, 128, 8, 3),
        ),
        128: (
            Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(64, 64, 8, 2), Tile(64, 64, 8, 3), Tile(32, 128, 8, 2),
            Tile(32, 128, 8, 3), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2),
        ),
        256: (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(64, 64, 8, 1)),
        512: (Tile(16, 32, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    },
}  # fmt: skip


class Spec(NamedTuple):
    """One shape to tune; ``mask`` is a key of :data:`MASKS`, with a leading ``dropout+`` for dropout."""

    batch: int
    seqlen: int
    nheads: int
    nheads_k: int
    head_dim: int
    v_head_dim: int
    mask: str
    dtype: str


def _documents(spec: Spec, causal: bool) -> AttentionMask:
    """Documents of 512 tokens packed into each row."""
    rows = torch.arange(spec.seqlen, dtype=torch.int32, device="cuda")[None].expand(spec.batch, -1)
    first = rows // 512 * 512
    end = rows + 1 if causal else torch.clamp(first + 512, max=spec.seqlen)
    return AttentionMask(row_intervals=torch.stack((first, end), dim=-1))


MASKS: dict[str, Callable[[Spec], AttentionMask]] = {
    "full": lambda _: AttentionMask(),
    "causal": lambda _: AttentionMask(causal=True),
    "window": lambda _: AttentionMask(causal=True, window=(1023, 0)),
    "packed": lambda spec: _documents(spec, True),
    "intervals": lambda spec: AttentionMask(
        row_intervals=torch.tensor((0, spec.seqlen), dtype=torch.int32, device="cuda").expand(1, spec.seqlen, 2)
    ),
}


class Work(NamedTuple):
    """The launches of a shape, by kernel, built anew for every tile; and its operations (forward)."""

    inputs: AttentionInputs
    build: dict[str, Callable[[], launch.Launch]]
    operations: float


def make_work(spec: Spec) -> Work:
    """Random data for a shape."""
    torch.manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    batch, seqlen, nheads, nheads_k, dim, v_dim = spec[:6]
    q = torch.randn(batch, seqlen, nheads, dim, device="cuda", dtype=dtype)
    k = torch.randn(batch, seqlen, nheads_k, dim, device="cuda", dtype=dtype)
    v = torch.randn(batch, seqlen, nheads_k, v_dim, device="cuda", dtype=dtype)
    dout = torch.randn(batch, seqlen, nheads, v_dim, device="cuda", dtype=dtype)
    mask = MASKS[spec.mask.removeprefix("dropout+")](spec)
    dropping = spec.mask.startswith("dropout+")
    seed = torch.ones(1, dtype=torch.int64, device="cuda") if dropping else None
    inputs = AttentionInputs(q, k, v, dim**-0.5, mask, dropout_p=0.1 * dropping, dropout_seed=seed)
    out, dq, dk, dv = torch.empty_like(dout), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    lse = torch.zeros(batch, nheads, seqlen, device="cuda")
    delta = torch.zeros_like(lse)
    summary = None
    if mask.row_intervals is not None:  # room for the smallest tiles
        summary = torch.zeros(batch, 4, seqlen // 16 + 1, dtype=torch.int32, device="cuda")

    def dkdv() -> launch.Launch:
        call = launch.prepare(inputs)
        launch.preprocess_launch(call, out, dout, lse, delta, summary).run()  # summaries belong to the tile
        return launch.dkdv_launch(call, dout, lse, delta, summary, dk, dv, 1)

    build = {
        "forward": lambda: launch.forward_launch(launch.prepare(inputs), out, lse),
        "dq": lambda: launch.dq_launch(launch.prepare(inputs), dout, lse, delta, dq, None),
        "dkdv": dkdv,
    }
    build["forward"]().run()
    visible = {"causal": 0.5, "window": min(1.0, 1024 / seqlen), "packed": min(1.0, 256 / seqlen)}
    share = visible.get(spec.mask.removeprefix("dropout+"), 1.0)
    return Work(inputs, build, 2.0 * batch * nheads * seqlen * seqlen * (dim + v_dim) * share)


def compile_candidate(spec: Spec, kind: str, tile: Tile) -> str:
    """Compile one candidate into Triton's cache; runs in a worker process. The error, or an empty string."""
    try:
        with tiles.override(**{kind: tile}):
            built = make_work(spec._replace(batch=1)).build[kind]()
            built.plan.kernel.warmup(*built.arguments, grid=(built.n_programs,), **built.plan.options)
    except Exception as error:  # out of shared memory, a compiler failure: the table says so
        return f"{type(error).__name__}: {error}".splitlines()[0][:80]
    return ""


def timed(runs: dict[Any, Callable[[], None]], rounds: int, repeat: int) -> dict[Any, float]:
    """Median milliseconds of each, in interleaved rounds."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for key, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            run()
            begin.record()
            for _ in range(repeat):
                run()
            end.record()
            end.synchronize()
            times[key].append(begin.elapsed_time(end) / repeat)
    return {key: statistics.median(values) for key, values in times.items()}


def sdpa_times(spec: Spec, work: Work, rounds: int, repeat: int) -> dict[str, float]:
    """torch's SDPA forward and backward on the same data, where it takes the mask by flags."""
    if spec.mask not in ("full", "causal"):
        return {}
    inputs = work.inputs
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    call = {"is_causal": spec.mask == "causal", "enable_gqa": spec.nheads != spec.nheads_k}
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    if spec.dtype == "float32":
        backend = torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend):
        try:
            out = F.scaled_dot_product_attention(q, k, v, **call)
        except RuntimeError:
            return {}
        grad = torch.randn_like(out)
        return timed(
            {
                "SDPA forward": lambda: F.scaled_dot_product_attention(q, k, v, **call),
                "SDPA backward": lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
            },
            rounds,
            repeat,
        )


def tune(
    spec: Spec, kinds: list[str], candidates: dict[str, list[Tile]], failed: dict[Any, str], rounds: int, repeat: int
) -> None:
    """Time the candidates of one shape and print its table."""
    print(f"\n{spec}", flush=True)
    work = make_work(spec)
    for name, ms in sdpa_times(spec, work, rounds, repeat).items():
        factor = 2.5 if "backward" in name else 1.0
        print(f"  {name:38s} {ms:8.3f} ms {factor * work.operations / ms / 1e9:7.1f} TFLOP/s", flush=True)
    factors = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}  # products each kernel does, in forwards
    best: dict[str, float] = {}
    for kind in kinds:
        chosen = tiles.select(_key(spec, kind))
        runs, notes = {}, {}
        for tile in candidates[kind]:
            if failed.get((spec, kind, tile)):
                print(f"  {kind:8s} {_name(tile, chosen):29s} {failed[spec, kind, tile]}", flush=True)
                continue
            with tiles.override(**{kind: tile}):
                built = work.build[kind]()
            try:
                compiled = built.plan.kernel[built.n_programs,](*built.arguments, **built.plan.options)
                torch.cuda.synchronize()
            except Exception as error:  # too much shared memory shows at the launch
                print(f"  {kind:8s} {_name(tile, chosen):29s} {str(error).splitlines()[0][:80]}", flush=True)
                continue
            # Tiles of dkdv read the summaries of their own preprocess: it is part of no timing, but precedes it.
            runs[tile] = partial(compiled[built.n_programs, 1, 1], *built.arguments, *built.plan.constexprs)
            notes[tile] = f"spills {getattr(compiled, 'n_spills', '?')}, shared {compiled.metadata.shared}"
        if kind == "dkdv" and work.inputs.mask.row_intervals is not None:
            times = {}
            for tile, run in runs.items():
                with tiles.override(dkdv=tile):
                    work.build[kind]()
                one: dict[Any, Callable[[], None]] = {tile: run}
                times.update(timed(one, rounds, repeat))
        else:
            times = timed(dict(runs), rounds, repeat)
        for tile, ms in sorted(times.items(), key=lambda item: item[1]):
            rate = factors[kind] * work.operations / ms / 1e9
            print(f"  {kind:8s} {_name(tile, chosen):29s} {ms:8.3f} ms {rate:7.1f} TFLOP/s  {notes[tile]}", flush=True)
        if times:
            best[kind] = min(times.values())
    if "dq" in best and "dkdv" in best:
        ms = best["dq"] + best["dkdv"]
        rate = 2.5 * work.operations / ms / 1e9
        print(f"  best dq + dkdv {ms:32.3f} ms {rate:7.1f} TFLOP/s (as backward)", flush=True)


def _key(spec: Spec, kind: str) -> tiles.TileKey:
    inputs = make_work(spec._replace(batch=1)).inputs
    structure = launch.prepare(inputs).structure
    rows = tiles.row_class(spec.seqlen, spec.batch * spec.nheads, structure.device)
    return launch.tile_key(kind, structure._replace(rows=rows))


def _name(tile: Tile, chosen: Tile) -> str:
    mark = " *" if tile == chosen else ""
    return f"{tile.block_m:4d} x{tile.block_n:4d} warps {tile.num_warps} stages {tile.num_stages}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="batch,seqlen,nheads,nheads_k,head_dim[,v_head_dim]")
    parser.add_argument("--masks", default="causal,full", help=f"of {', '.join(MASKS)}; dropout+causal, ...")
    parser.add_argument("--kinds", default="forward,dq,dkdv")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--add", action="append", default=[], help="one more candidate: block_m,block_n,warps,stages")
    parser.add_argument("--only-added", action="store_true", help="time the chosen tile and those of --add alone")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=10, help="launches in a row per round")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    added = [Tile(*map(int, text.split(","))) for text in args.add]
    specs = []
    for text in args.shape or DEFAULT_SHAPES:
        batch, seqlen, nheads, nheads_k, head_dim, *rest = (int(part) for part in text.split(","))
        shape = (batch, seqlen, nheads, nheads_k, head_dim, rest[0] if rest else head_dim)
        specs += [Spec(*shape, mask, args.dtype) for mask in args.masks.split(",")]
    todo = {}
    for spec in specs:
        dim = max(64, tiles.padded(max(spec.head_dim, spec.v_head_dim)))
        for kind in kinds:
            table = () if args.only_added else CANDIDATES[kind][dim]
            todo[spec, kind] = list(dict.fromkeys([tiles.select(_key(spec, kind)), *table, *added]))
    failed: dict[tuple[Spec, str, Tile], str] = {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
        futures = {
            pool.submit(compile_candidate, spec, kind, tile): (spec, kind, tile)
            for (spec, kind), candidates in todo.items()
            for tile in candidates
        }
        for future, key in futures.items():
            failed[key] = future.result()
    for spec in specs:
        tune(spec, kinds, {kind: todo[spec, kind] for kind in kinds}, failed, args.rounds, args.repeat)


if __name__ == "__main__":
    main()
