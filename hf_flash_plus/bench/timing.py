"""Measuring several calls side by side: warm-up, turns in changing order, rests, medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

_MAX_REPEATS = 200
#: The device is kept busy this long at most while the host queues a turn's calls.
_MAX_LEAD_MS = 50.0
_SLEEP_CYCLES_PER_MS = 1_800_000


@dataclass(frozen=True)
class Measurement:
    """Times of one call: over all samples, and the median of each round (how much they differ says how steady).

    A sample is one call, or the mean of a :class:`Chain`'s calls.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    rounds_ms: list[float]
    samples: int
    host_us: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Chain(NamedTuple):
    """Several calls that are timed together, in a row.

    Attributes:
        run: runs them all.
        calls: how many.
        single: one of them, for the host's time.
    """

    run: Callable[[], Any]
    calls: int
    single: Callable[[], Any]


class CudaClock:
    """Device time by CUDA events. The L2 cache is flushed before each call; the device is kept asleep while the host
    queues the calls, so that a slow host is not counted (it is reported apart, as ``host_us``).

    Flushed by reading: what was written would have to leave the cache while the call runs, at its expense (50 MB are 15
    us of an H100's memory, half of a small decoding step).
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        size = max(2 * getattr(properties, "L2_cache_size", 0), 64 * 2**20)
        self._flush = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)
        self._host_ms: dict[int, float] = {}

    def host_ms(self, call: Callable[[], Any], repeats: int = 5) -> float:
        """Milliseconds the host needs to queue one call."""
        torch.cuda.synchronize()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
            torch.cuda.synchronize()
        return statistics.median(times)

    def sample(self, call: Callable[[], Any], repeats: int, host_ms: float) -> list[float]:
        """Milliseconds of ``repeats`` calls."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda._sleep(int(min(1.5 * host_ms * repeats + 0.1, _MAX_LEAD_MS) * _SLEEP_CYCLES_PER_MS))
        for begin, end in events:
            torch.sum(self._flush, dim=0, out=self._sum)
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]


class HostClock:
    """Wall-clock time, for the CPU."""

    def host_ms(self, call: Callable[[], Any], repeats: int = 1) -> float:
        return statistics.median(self.sample(call, repeats, 0.0))

    def sample(self, call: Callable[[], Any], repeats: int, host_ms: float) -> list[float]:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        return times


def make_clock(device: torch.device) -> CudaClock | HostClock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


def copy_bandwidth(device: torch.device, n_bytes: int = 2**30) -> float | None:
    """GB/s of a large copy in the device's memory, reads and writes counted; None where there is no clock for it.

    A floor for decoding that has no launch in it, and no start and end of a kernel, in which memory idles: small calls
    stay above it however they are timed. Reading alone is somewhat faster: large calls can be below it.
    """
    if device.type != "cuda":
        return None
    source = torch.empty(n_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * n_bytes / statistics.median(times) / 1e6


def measure(
    calls: Mapping[str, Callable[[], Any] | Chain],
    clock: CudaClock | HostClock,
    *,
    rounds: int,
    budget_s: float,
    rest_s: float,
) -> dict[str, Measurement]:
    """Time every call, in turns.

    The order is drawn anew for each round: a chip that is hot from one call, or holds its power down for it, is so for
    the next, which should not be the same one every time.

    Args:
        calls: what to time, by name; a chain's time is divided by its number of calls.
        clock: see :func:`make_clock`.
        rounds: number of turns of each call.
        budget_s: seconds for all of it together, warm-up apart.
        rest_s: seconds of rest between rounds.
    """
    chains = {name: call if isinstance(call, Chain) else Chain(call, 1, call) for name, call in calls.items()}
    repeats: dict[str, int] = {}
    host: dict[str, float] = {}
    queue: dict[str, float] = {}
    for name, chain in chains.items():
        for _ in range(3):
            chain.run()
        host[name] = queue[name] = clock.host_ms(chain.single)
        if chain.run is not chain.single:
            queue[name] = clock.host_ms(chain.run)
        once_ms = max(statistics.median(clock.sample(chain.run, 3, queue[name])), 1e-4)
        share_ms = budget_s * 1e3 / (len(calls) * rounds)
        repeats[name] = max(2, min(_MAX_REPEATS, int(share_ms / once_ms)))
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(calls), len(calls)):
            turn = clock.sample(chains[name].run, repeats[name], queue[name])
            samples[name].append([value / chains[name].calls for value in turn])
        time.sleep(rest_s)
    return {name: _summarize(turns, host[name]) for name, turns in samples.items()}


def _summarize(turns: list[list[float]], host_ms: float) -> Measurement:
    ordered = sorted(value for turn in turns for value in turn)
    last = len(ordered) - 1
    return Measurement(
        median_ms=statistics.median(ordered),
        p10_ms=ordered[round(last * 0.1)],
        p90_ms=ordered[round(last * 0.9)],
        rounds_ms=[statistics.median(turn) for turn in turns],
        samples=len(ordered),
        host_us=host_ms * 1e3,
    )
