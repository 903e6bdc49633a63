"""The ``memory`` benchmark: extra peak memory of forward + backward, per case and peer."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from .config import BenchConfig, Case, peer_name
from .kernels import Progress, Row, _check_device, _row, _short, extra_peak_bytes
from .peers import Declined, Peer, get_peer
from .problem import Problem


def run_memory(
    config: BenchConfig, device: torch.device, save: Callable[[list[Row]], None], progress: Progress
) -> list[Row]:
    """Measure all cases; needs CUDA, whose allocator counts."""
    if device.type != "cuda":
        raise ValueError("a memory benchmark needs a CUDA device, whose allocator counts bytes.")
    rows: list[Row] = []
    for case in config.cases:
        progress(f"memory {case.name}")
        for entry in config.peers:
            peer = get_peer(peer_name(entry))
            if not config.allows(peer.name, case):
                rows.append(_row(case, "memory", peer, "skipped", "not measured on this case (limits)"))
                continue
            gc.collect()
            torch.cuda.empty_cache()
            rows.append(_measure(config, case, peer, device))
            save(rows)
    return rows


def _measure(config: BenchConfig, case: Case, peer: Peer, device: torch.device) -> Row:
    try:
        prepared = peer.build(Problem(case, config.dtype, device), True)
        # Twice: the first call compiles, tunes and fills caches.
        peak = [extra_peak_bytes(prepared, device) for _ in range(2)][-1]
    except Declined as error:
        return _row(case, "memory", peer, "declined", str(error))
    except Exception as error:  # a peer's failure is a result
        _check_device(device, peer)
        return _row(case, "memory", peer, "error", _short(error))
    return _row(case, "memory", peer, "ok") | {"value": peak / 2**20, "unit": "MiB", "extra_peak_bytes": peak}
