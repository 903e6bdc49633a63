"""Run a benchmark from its configuration: the one function that ``hf-flash-plus bench`` calls."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .config import BenchConfig, Case, ConfigError, peer_name
from .e2e import run_e2e, work_name
from .environment import describe
from .kernels import Progress, Row, run_kernels
from .memory import run_memory
from .peers import get_peer
from .report import result, write_json

_RUNNERS = {"kernels": run_kernels, "e2e": run_e2e, "memory": run_memory}


def select(config: BenchConfig, peers: list[str] | None = None, cases: list[str] | None = None) -> BenchConfig:
    """The benchmark narrowed to some peers (replacing the file's) and to the cases whose name contains a given text.

    Raises:
        ConfigError: nothing is left, or a peer does not exist.
    """
    if peers:
        known = {peer_name(entry): entry for entry in config.peers}
        config = replace(config, peers=tuple(known.get(name, name) for name in peers))
        if config.baseline not in peers:
            config = replace(config, baseline=peers[0])
    if config.kind != "e2e":
        for entry in config.peers:
            try:
                get_peer(peer_name(entry))
            except ValueError as error:
                raise ConfigError(str(error)) from None
    if cases:

        def wanted(name: str) -> bool:
            return any(text in name for text in cases)

        kept: tuple[Case, ...] = tuple(case for case in config.cases if wanted(case.name))
        works = tuple(work for work in config.works if wanted(work_name(work)))
        if not kept and not works:
            raise ConfigError(f"no case's name contains any of {cases}.")
        config = replace(config, cases=kept, works=works)
    return config


def run(config: BenchConfig, device: torch.device, out: Path, progress: Progress) -> dict[str, Any]:
    """Run a benchmark and write ``<out>/<name>.json``, again after every case, so that a stop loses little."""
    environment = describe()
    begin = time.monotonic()
    path = out / f"{config.name}.json"

    def save(rows: list[Row]) -> None:
        write_json(result(config, rows, environment, time.monotonic() - begin), path)

    rows = _RUNNERS[config.kind](config, device, save, progress)
    found = result(config, rows, environment, time.monotonic() - begin)
    write_json(found, path)
    return found
