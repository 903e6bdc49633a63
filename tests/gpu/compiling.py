"""Compile the kernels of the GPU tests in parallel processes, before the tests: in turn it takes most of the time.

python -m tests.gpu.compiling --jobs 16     everything the three files of kernel tests need, into Triton's cache
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple


class Compilation(NamedTuple):
    """``compile(*arguments)`` in a worker process; those of one ``key`` mostly share kernels: one process does them."""

    key: Hashable
    compile: Callable[..., Any]
    arguments: tuple[Any, ...]


def kind_of_mask(features: Sequence[str]) -> str:
    """Which kind of mask the Hopper kernels are compiled for, by the features of a case."""
    intervals = {"packed", "documents", "left_padding", "right_padding", "ends", "intervals", "one_interval", "nothing"}
    if intervals & set(features):
        return "intervals"
    if {"window", "left_window"} & set(features):
        return "left"
    return "right" if {"causal", "right_window"} & set(features) else "full"


def _do(work: Sequence[Compilation]) -> None:
    for one in work:
        with contextlib.suppress(Exception):  # the test itself will fail with it
            one.compile(*one.arguments)


def compile_all(work: Sequence[Compilation], jobs: int) -> None:
    """Compile, with ``jobs`` processes; launches nothing."""
    groups: dict[Hashable, list[Compilation]] = {}
    for one in work:
        groups.setdefault(one.key, []).append(one)
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_do, group) for group in groups.values()]:
            future.result()


def unless_parallel(work: Sequence[Compilation]) -> None:
    """For fixtures: :func:`compile_all`, unless several processes run tests (and so compile) anyway."""
    jobs = int(os.environ.get("HF_FLASH_PLUS_COMPILE_JOBS", "8"))
    if jobs > 1 and "PYTEST_XDIST_WORKER" not in os.environ:
        compile_all(work, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the kernels of the GPU tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 8)
    jobs = parser.parse_args().jobs
    from tests.gpu import test_hopper, test_hopper_backward, test_kernels

    begin = time.monotonic()
    # The slowest to compile first.
    work = [*test_hopper_backward.compilations(), *test_hopper.compilations(), *test_kernels.compilations()]
    compile_all(work, jobs)
    print(f"compiled for {len(work)} calls in {time.monotonic() - begin:.0f} s, {jobs} processes")


if __name__ == "__main__":
    main()
