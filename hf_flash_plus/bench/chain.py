"""A decoding step's calls in a row: one CUDA graph with a call of each of N layers, each with its own cache.

A call that is timed alone has events and its launch in its time, about 4 us beside calls of 8 to 40, and nothing runs
before or after it. In generation a step runs the layers of a model one after another, from a CUDA graph where speed
matters: a launch is then hidden behind the call before as far as the kernels let it, and no layer finds its keys in the
L2 cache, because the other layers' have been read since. In a model there are other kernels between two attention
calls; here there are none, so that what a kernel gains by overlapping the attention call before it is the most it can
gain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import Case

#: Layers with ``layers: auto``: a small model's at least, and a large model's at most.
LEAST, MOST = 8, 64
#: So many layers where they are cheap: the graph's own start, some microseconds, is shared by them.
USUAL = 32
#: All caches of the chain together, at least, in sizes of the L2 cache.
L2_TIMES = 3
#: Memory for the caches. Peers may need a second copy of each (pages; another layout).
CACHE_BYTES = 12 * 2**30


class Length(NamedTuple):
    """How many calls a chain has, and among how many caches they are dealt, in turns. Fewer caches than layers there
    are only where memory holds no more; what is read between two uses of a cache is then a hundred times the L2."""

    layers: int
    caches: int


def length(wanted: int | str, case: Case, itemsize: int, l2_bytes: int) -> Length:
    """The length of a case's chain.

    Args:
        wanted: a number of layers; ``auto``: as many as have caches of three times the L2 together, 8 to 64, and up to
            32 while their caches fit into 12 GiB. (Before each replay the cache is flushed, so that also small caches
            of few layers are read from memory.)
        itemsize: bytes of an element.
        l2_bytes: size of the L2 cache.
    """
    fit = max(1, CACHE_BYTES // (2 * case.batch * case.seqlen * case.kv_heads * case.head_dim * itemsize))
    if wanted == "auto":
        cold = min(MOST, math.ceil(L2_TIMES * l2_bytes / case.kv_bytes(itemsize)))
        layers = max(LEAST, cold, min(USUAL, fit))
    else:
        layers = int(wanted)
    return Length(layers, min(layers, fit))


def record(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], list[Tensor]]:
    """A function that runs all calls in a row and returns their outputs: replays of one CUDA graph, which write the
    same outputs each time; on other devices simply the calls.

    The function holds the calls: a graph has only addresses of the tensors that they read, and a tensor that nobody
    holds any more is given to somebody else, or (the next graph's capture empties torch's cache) back to the device.

    Raises:
        Exception: whatever a call raises that cannot be captured.
    """
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    here, beside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for call in calls:
            call()
    here.wait_stream(beside)
    graph, outputs = torch.cuda.CUDAGraph(), list[Tensor]()
    # Relaxed: what the captured code path compiles, it may load. What escapes the capture is found by `errors`.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        for call in calls:
            outputs.append(call())

    return partial(_replay, graph, outputs, tuple(calls))


def _replay(
    graph: torch.cuda.CUDAGraph, outputs: list[Tensor], _held: tuple[Callable[[], Tensor], ...]
) -> list[Tensor]:
    graph.replay()
    return outputs


def errors(replay: Callable[[], list[Tensor]], measure: Sequence[Callable[[Tensor], float]]) -> list[float]:
    """Each layer's error after a replay, by its own ``measure``. The outputs are NaN before: a call that was left out
    of the graph, or went to another layer's output, is not right by accident."""
    for output in replay():
        output.fill_(float("nan"))
    return [error(output) for error, output in zip(measure, replay(), strict=True)]


def worst(found: Sequence[float]) -> float:
    """The largest error, or NaN where one is."""
    return next((error for error in found if error != error), max(found))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 where that is not known."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0))
