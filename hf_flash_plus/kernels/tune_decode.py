"""Time tiles, prefetching and splits of the decoding kernel on this GPU, beside torch's SDPA; what wins is written into
``_SM90_WAYS`` of ``decode_launch.py`` (``tune_decode_report.py`` proposes the entries).

Usage::

    python -m hf_flash_plus.kernels.tune_decode --out sweep.json                 # 1 to 64 rows, 512 to 32768 keys
    python -m hf_flash_plus.kernels.tune_decode --batch 1,16 --keys 2048 --head-dims 64 --add 256,8,2,0
    python -m hf_flash_plus.kernels.tune_decode --pages 16,256 --padded          # also from pages, and padded batches
    python -m hf_flash_plus.kernels.tune_decode --check                          # only whether candidates are right
    python -m hf_flash_plus.kernels.tune_decode_report sweep.json

Every candidate is compared with attention in fp32 before it is timed. Times are of the device, by events, with the L2
cache flushed before each call (``bench/timing.py``). All candidates are screened; the best of them, the kernel as it is
now, the same without the one-row path, and torch then take turns. A candidate is ``keys x warps x stages``, ``+``
keys asked for ahead, and the number of splits; ``two`` are combined in a second launch, else by the program that comes
last. Without a GPU, ``TRITON_INTERPRET=1`` runs the whole script on small shapes to try it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bench.timing import CudaClock, HostClock, copy_bandwidth, make_clock
from ..inputs import AttentionInputs
from ..masks import CAUSAL, AttentionMask
from . import decode_launch, launch
from .decode_launch import Way
from .tiles import Tile

#: Keys, warps and stages; each with every number of keys to prefetch.
TILES = (
    (64, 4, 3), (128, 4, 2), (64, 4, 4), (128, 8, 2), (32, 4, 4), (128, 4, 3), (256, 8, 2), (64, 2, 3), (64, 1, 3),
    (32, 2, 5), (128, 8, 3),
)  # fmt: skip
PREFETCH = (0, 128, 512)
#: Of these calls from pages and padded ones get all; the others would take too long.
FEW_TILES = ((64, 4, 3), (128, 4, 2), (64, 4, 4), (128, 8, 2))
_SHARED = 226 * 1024
_TOLERANCE = 8e-3  # of the norm: bf16 rounds outputs and weights to 2e-3
_DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
#: The interpreter multiplies bf16 matrices wrongly.
_DTYPE = torch.bfloat16 if _DEVICE.type == "cuda" else torch.float16
_CORES = torch.cuda.get_device_properties(0).multi_processor_count if _DEVICE.type == "cuda" else 16
#: What the host needs for a call at most, so that the device does not wait for it.
_HOST_MS = 0.08


class Spec(NamedTuple):
    """One shape; ``page_size`` 0 is no pages; ``padded`` rows have a quarter of the keys to all of them."""

    batch: int
    keys: int
    nheads: int
    nheads_k: int
    head_dim: int
    page_size: int = 0
    padded: bool = False

    @property
    def lengths(self) -> list[int]:
        if not self.padded:
            return [self.keys] * self.batch
        low = max(1, self.keys // 4)
        return [low + (self.keys - low) * i // max(self.batch - 1, 1) for i in range(self.batch)]

    @property
    def programs(self) -> int:
        return self.batch * self.nheads_k

    def __str__(self) -> str:
        kind = (f" pages{self.page_size}" if self.page_size else "") + (" padded" if self.padded else "")
        return f"B{self.batch} K{self.keys} H{self.nheads}/{self.nheads_k} D{self.head_dim}{kind}"


class Candidate(NamedTuple):
    """A way with a number of splits, combined in a second launch or not; ``one_row`` False is the path of several
    rows."""

    block_n: int
    warps: int
    stages: int
    prefetch: int
    splits: int
    two: bool
    one_row: bool = True

    def __str__(self) -> str:
        ahead = f"+{self.prefetch}" if self.prefetch else ""
        tail = (" two" if self.two else "") + ("" if self.one_row else " general")
        return f"{self.block_n}x{self.warps}x{self.stages}{ahead} s{self.splits}{tail}"

    @property
    def way(self) -> Way:
        return Way(Tile(16, self.block_n, self.warps, self.stages), self.prefetch, self.block_n)


class Data(NamedTuple):
    """The tensors of a shape: the call, its block table, and keys and values ``(batch, nheads_k, keys, dim)``."""

    inputs: AttentionInputs
    table: Tensor | None
    key: Tensor
    value: Tensor


def make_data(spec: Spec, seed: int = 0) -> Data:
    """Random tensors, as a layer has them; what lies before a padded row's keys is NaN."""
    generator = torch.Generator(device=_DEVICE).manual_seed(seed)

    def draw(rows: int, heads: int) -> Tensor:
        shape = (spec.batch, heads, rows, spec.head_dim)
        return torch.randn(shape, device=_DEVICE, dtype=_DTYPE, generator=generator)

    query, key, value = 2 * draw(1, spec.nheads), draw(spec.keys, spec.nheads_k), draw(spec.keys, spec.nheads_k)
    mask, table = CAUSAL, None
    if spec.padded:
        starts = spec.keys - torch.tensor(spec.lengths, device=_DEVICE)
        real = torch.arange(spec.keys, device=_DEVICE)[None] >= starts[:, None]
        for tensor in (key, value):
            tensor.masked_fill_(~real[:, None, :, None], float("nan"))
        spans = torch.stack((starts, torch.full_like(starts, spec.keys)), dim=-1).to(torch.int32)[:, None]
        mask = AttentionMask(
            row_intervals=spans, key_mask=real, key_holes=torch.zeros(spec.batch, dtype=torch.int32, device=_DEVICE)
        )
    keys, values = key.transpose(1, 2), value.transpose(1, 2)
    if spec.page_size:
        # The last page may be used in part; what lies behind is NaN.
        size, pages = spec.page_size, -(-spec.keys // spec.page_size)
        order = torch.randperm(spec.batch * pages, generator=torch.Generator().manual_seed(seed)).to(_DEVICE)

        def paged(tensor: Tensor) -> Tensor:
            whole = F.pad(tensor, (0, 0, 0, 0, 0, pages * size - spec.keys), value=float("nan"))
            whole = whole.reshape(-1, size, spec.nheads_k, spec.head_dim)
            return torch.empty_like(whole).index_copy_(0, order, whole)

        keys, values, table = paged(keys), paged(values), order.view(spec.batch, pages).to(torch.int32)
        spans = torch.tensor([[[0, spec.keys]]], dtype=torch.int32, device=_DEVICE).repeat(spec.batch, 1, 1)
        mask = AttentionMask(row_intervals=spans)
    inputs = AttentionInputs(query.transpose(1, 2), keys, values, spec.head_dim**-0.5, mask)
    return Data(inputs, table, key, value)


def reference(spec: Spec, data: Data) -> Tensor:
    """``(batch, 1, nheads, dim)`` in fp32."""
    out = torch.empty((spec.batch, 1, spec.nheads, spec.head_dim), device=_DEVICE, dtype=torch.float32)
    for row, length in enumerate(spec.lengths):
        query = data.inputs.query[row, 0].float().view(spec.nheads_k, -1, spec.head_dim)
        key, value = (t[row, :, spec.keys - length :].float() for t in (data.key, data.value))
        weights = torch.softmax(query @ key.transpose(1, 2) * spec.head_dim**-0.5, dim=-1)
        out[row, 0] = (weights @ value).reshape(spec.nheads, spec.head_dim)
    return out


def launches(spec: Spec, data: Data, candidate: Candidate) -> tuple[Tensor, list[launch.Launch]]:
    """The output, and the launches that compute it."""
    call = launch.prepare(data.inputs)
    group = spec.nheads // spec.nheads_k
    recipe = decode_launch.make_recipe(call.structure, candidate.way, group, spec.page_size, candidate.one_row)
    out, space = torch.full_like(data.inputs.query, float("nan"), memory_format=torch.contiguous_format), None
    programs, splits = spec.programs * recipe.row_tiles, candidate.splits
    if splits > 1:
        counters = None if candidate.two else torch.zeros(programs, dtype=torch.int32, device=_DEVICE)
        parts = torch.empty(programs * splits * recipe.floats, dtype=torch.float32, device=_DEVICE)
        space = decode_launch.Workspace(parts, counters)
    keys = spec.keys if data.table is None else data.table.shape[1] * spec.page_size
    built = [decode_launch.decode_launch(call, recipe, out, None, keys, splits, space, data.table)]
    if space is not None and candidate.two:
        built.append(decode_launch.combine_launch(call.structure, recipe, out, None, spec.nheads_k, splits, space))
    return out, built


def compile_candidate(spec: Spec, candidate: Candidate) -> str:
    """Compile one candidate into Triton's cache; runs in a worker process. The error, or an empty string."""
    try:
        small = spec._replace(batch=2, keys=512)
        for built in launches(small, make_data(small), candidate)[1]:
            if hasattr(built.plan.kernel, "warmup") and _DEVICE.type == "cuda":
                built.plan.kernel.warmup(*built.arguments, grid=(built.n_programs,), **built.plan.options)
    except Exception as error:  # out of shared memory, a compiler failure: the table says so
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return ""


def ways(spec: Spec, more: list[tuple[int, ...]]) -> list[tuple[int, int, int, int]]:
    """Keys, warps, stages and prefetched keys that fit the memory of a multiprocessor."""
    few = bool(spec.page_size or spec.padded)
    found = [(*tile, ahead) for tile in (FEW_TILES if few else TILES) for ahead in PREFETCH]
    found += [(w[0], w[1], w[2], w[3] if len(w) > 3 else 0) for w in more]
    return [w for w in found if max(1, w[2] - 1) * 4 * w[0] * spec.head_dim <= _SHARED]


def candidates(spec: Spec, usable: set[tuple[Any, ...]], more: list[tuple[int, ...]]) -> list[Candidate]:
    """What is screened for a shape: numbers of splits around one program for each multiprocessor."""
    found = []
    full = max(1, _CORES // spec.programs)
    for way in ways(spec, more):
        wanted = {1, full // 4, full // 2, full, 2 * full}
        if way[1] <= 2 or spec.padded:  # small programs, or of several lengths: more of them
            wanted |= {4 * full} | ({8 * full} if spec.padded else set())
        for splits in sorted(wanted):
            if not 1 <= splits <= decode_launch.MAX_SPLITS or (splits > 1 and splits * way[0] > spec.keys):
                continue
            for two in (False, True) if splits > 1 else (False,):
                if (_kind(spec), *way, splits > 1, two) in usable:
                    found.append(Candidate(*way, splits, two))
    return found


def _kind(spec: Spec) -> tuple[int, int, bool]:
    """What compiled kernels differ by, apart from the candidate."""
    return (spec.head_dim, spec.page_size, spec.padded)


def wrong(out: Tensor, exact: Tensor) -> float | None:
    """The relative error where it is too large (or NaN), else None."""
    error = float((out.float() - exact).norm() / exact.norm())
    return None if error < _TOLERANCE else error


def _run(built: list[launch.Launch]) -> Callable[[], None]:
    if len(built) == 1:
        return built[0].run

    def run() -> None:
        for one in built:
            one.run()

    return run


def _sdpa(spec: Spec, data: Data) -> Callable[[], Tensor]:
    """torch's default, without padding (its call with a mask is another matter) and from contiguous keys."""
    query = data.inputs.query.transpose(1, 2).contiguous()
    return lambda: F.scaled_dot_product_attention(query, data.key, data.value, enable_gqa=True)


def interleaved(
    calls: dict[str, Callable[[], Any]], clock: CudaClock | HostClock, rounds: int, samples: int
) -> dict[str, list[float]]:
    """Microseconds of each call: the median of each round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name in order:
            times[name].append(statistics.median(clock.sample(calls[name], samples, _HOST_MS)) * 1e3)
        order = order[1:] + order[:1]
        time.sleep(0.005)
    return times


def tune(
    spec: Spec, found: list[Candidate], clock: CudaClock | HostClock, args: argparse.Namespace, copy_gbs: float
) -> dict[str, Any]:
    """Screen the candidates of a shape, then time the best beside what there is."""
    data = make_data(spec)
    exact = reference(spec, data)
    screened: dict[Candidate, float] = {}
    errors: dict[str, str] = {}
    for candidate in found:
        try:
            out, built = launches(spec, data, candidate)
            call = _run(built)
            call()
            error = wrong(out, exact)
            if error is None:
                call()  # once more: the first left the counters at zero, if all is well
                error = wrong(out, exact)
            if error is not None:
                errors[str(candidate)] = f"WRONG by {error:.3g}"
                continue
            screened[candidate] = statistics.median(clock.sample(call, args.screen, _HOST_MS)) * 1e3
        except Exception as failure:
            errors[str(candidate)] = f"{type(failure).__name__}: {failure}".splitlines()[0][:120]
    ranked = sorted(screened, key=lambda c: screened[c])
    final = ranked[: args.best]
    # The best of each kind as well: one launch and two, with and without prefetching.
    for test in (lambda c: c.two, lambda c: not c.two, lambda c: not c.prefetch, lambda c: c.splits == 1):
        final += [c for c in ranked if test(c) and c not in final][:1] if not any(map(test, final)) else []
    calls: dict[str, Callable[[], Any]] = {"now": lambda: decode_launch.forward(data.inputs, data.table)}
    if wrong(decode_launch.forward(data.inputs, data.table)[0], exact) is not None:
        errors["now"] = "WRONG"
    # As it was before there was a path for one row: the same tile and splits.
    structure = launch.prepare(data.inputs).structure
    rule = decode_launch._way(structure, 16, spec.programs, -1, decode_launch.WHOLE)
    splits = decode_launch.n_splits(spec.programs, spec.keys, rule.least_keys, _CORES)
    before = Candidate(*rule.tile[1:], 0, splits, splits > 1, False)
    for candidate in (*final, before):
        calls[str(candidate)] = _run(launches(spec, data, candidate)[1])
    if not spec.padded and not spec.page_size:
        calls["sdpa"] = _sdpa(spec, data)
    else:  # the same amount of keys in one piece
        like = spec._replace(page_size=0, padded=False, keys=sum(spec.lengths) // spec.batch)
        plain = make_data(like, 1)
        calls["contiguous"] = lambda: decode_launch.forward(plain.inputs)
        calls["sdpa"] = _sdpa(like, plain)
    times = interleaved(calls, clock, args.rounds, args.samples)
    row = {
        "spec": spec._asdict(),
        "name": str(spec),
        "floor_us": 4 * sum(spec.lengths) * spec.nheads_k * spec.head_dim / copy_gbs / 1e3,
        "before": str(before),
        "us": {name: statistics.median(values) for name, values in times.items()},
        "rounds_us": times,
        "candidates": {str(c): c._asdict() for c in (*ranked, before)},
        "screened_us": {str(c): screened[c] for c in ranked},
        "errors": errors,
    }
    _print(row)
    return row


def _print(row: dict[str, Any]) -> None:
    us, best = row["us"], [name for name in row["us"] if name in row["candidates"] and name != row["before"]]
    best.sort(key=lambda name: us[name])
    like = f", contiguous {us['contiguous']:.2f}" if "contiguous" in us else ""
    shown = "; ".join(f"{name}: {us[name]:.2f}" for name in best[:4])
    print(
        f"{row['name']}: floor {row['floor_us']:.2f}, sdpa {us['sdpa']:.2f}{like}, "
        f"before {us[row['before']]:.2f}, now {us['now']:.2f}; {shown}",
        flush=True,
    )
    for name, text in list(row["errors"].items())[:3]:
        print(f"    {name}: {text}", flush=True)


def check(usable: set[tuple[Any, ...]], specs: list[Spec], more: list[tuple[int, ...]], seconds: float) -> int:
    """Every usable candidate on lengths around its tiles; the number of wrong ones."""
    failures, n_checked, begin = 0, 0, time.perf_counter()
    lengths = (1, 17, 63, 65, 129, 300, 513, 1000) if _DEVICE.type == "cuda" else (1, 65)
    kinds = {_kind(spec): spec for spec in specs}
    for keys, kind in itertools.product(lengths, kinds):
        spec = kinds[kind]._replace(batch=3, keys=keys)
        data = make_data(spec)
        exact = reference(spec, data)
        for way in ways(spec, more):
            for splits, two in ((1, False), (3, False), (3, True), (8, False), (8, True)):
                if (kind, *way, splits > 1, two) not in usable:
                    continue
                if time.perf_counter() - begin > seconds:
                    print(f"checked {n_checked} in {seconds:.0f} s, then cut off; {failures} wrong", flush=True)
                    return failures
                candidate = Candidate(*way, splits, two)
                try:
                    out, built = launches(spec, data, candidate)
                    _run(built)()
                    error: float | str | None = wrong(out, exact)
                except Exception as failure:
                    error = f"{type(failure).__name__}: {failure}"
                n_checked += 1
                if error is not None:
                    failures += 1
                    print(f"WRONG: {spec}, {candidate}: {error}", flush=True)
    print(f"checked {n_checked} calls, {failures} wrong", flush=True)
    return failures


def compile_all(specs: list[Spec], more: list[tuple[int, ...]], jobs: int) -> set[tuple[Any, ...]]:
    """Compile all candidates in parallel; which can be used, as (kind, way, split, two launches)."""
    usable = set()
    wanted = [
        (spec, Candidate(*way, splits, two))
        for spec in {_kind(spec): spec for spec in specs}.values()
        for way in ways(spec, more)
        for splits, two in ((1, False), (4, False), (4, True))
    ]
    if _DEVICE.type == "cpu":
        return {(_kind(spec), *c[:4], c.splits > 1, c.two) for spec, c in wanted}
    # Combinations of other numbers of splits, and what candidates are compared with.
    wanted += [
        (spec, Candidate(*TILES[0], 0, splits, True))
        for spec in {_kind(spec): spec for spec in specs}.values()
        for splits in (8, 16, 32)
    ]
    wanted += [
        (spec, Candidate(*tile, 0, splits, splits > 1, False))
        for spec in {_kind(spec): spec for spec in specs}.values()
        for tile in ([(64, 4, 3)] if spec.head_dim > 64 else [(128, 4, 3), (64, 4, 4), (128, 4, 2)])
        for splits in (1, 4)
    ]
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (spec, c), error in zip(wanted, pool.map(compile_candidate, *zip(*wanted), chunksize=4)):
            if error:
                print(f"{_kind(spec)} {c}: {error}", flush=True)
            elif c.one_row:
                usable.add((_kind(spec), *c[:4], c.splits > 1, c.two))
    return usable


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _specs(args: argparse.Namespace) -> list[Spec]:
    nheads, nheads_k = _numbers(args.heads)
    shapes = list(itertools.product(_numbers(args.batch), _numbers(args.keys), _numbers(args.head_dims)))
    specs = [Spec(batch, keys, nheads, nheads_k, dim) for batch, keys, dim in shapes]
    special = list(itertools.product(*(map(_numbers, (args.special_batch, args.special_keys, args.head_dims)))))
    for size in _numbers(args.pages):
        specs += [Spec(batch, keys, nheads, nheads_k, dim, size) for batch, keys, dim in special]
    if args.padded:
        specs += [Spec(b, keys, nheads, nheads_k, dim, 0, True) for b, keys, dim in special if b > 1]
    return specs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,4,16,64")
    parser.add_argument("--keys", default="512,2048,8192,32768")
    parser.add_argument("--head-dims", default="64,128")
    parser.add_argument("--heads", default="32,8", help="query heads, key heads")
    parser.add_argument("--pages", default="", help="sizes of pages, measured with --special-batch and --special-keys")
    parser.add_argument("--padded", action="store_true", help="padded batches, with the same")
    parser.add_argument("--special-batch", default="1,4,16")
    parser.add_argument("--special-keys", default="2048,8192")
    parser.add_argument("--add", action="append", default=[], help="one more: keys,warps,stages[,prefetch]")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--check-seconds", type=float, default=20.0, help="time for checking odd lengths; 0: do not")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no further shape after that time")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--screen", type=int, default=9, help="samples of each candidate")
    parser.add_argument("--rounds", type=int, default=7, help="turns of the best")
    parser.add_argument("--samples", type=int, default=15, help="samples in each turn")
    parser.add_argument("--best", type=int, default=6, help="candidates that take turns")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    specs, more = _specs(args), [_numbers(text) for text in args.add]
    begin = time.perf_counter()
    usable = compile_all(specs, more, args.jobs)
    print(f"{len(usable)} kernels compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    if args.check_seconds and check(usable, specs, more, args.check_seconds) and args.check:
        raise SystemExit(1)
    if args.check:
        return
    clock, copy_gbs = make_clock(_DEVICE), copy_bandwidth(_DEVICE) or 100.0
    found: dict[str, Any] = {"copy_gbs": copy_gbs, "cores": _CORES, "rows": []}
    begin = time.perf_counter()
    for spec in specs:
        if time.perf_counter() - begin > args.seconds:
            print(f"out of time before {spec}", flush=True)
            break
        try:
            found["rows"].append(tune(spec, candidates(spec, usable, more), clock, args, copy_gbs))
        except Exception as error:  # the other shapes are worth having
            print(f"{spec}: {type(error).__name__}: {error}", flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
