"""GPU tests: skipped with the reason where there is no CUDA device; a run can be recorded.

``pytest tests/gpu --record-file PATH`` writes a record of the run (see ``recording``). ``python -m tests.gpu.suite``
(``make gpu-test``) runs everything and writes ``record.json``, which is never written by hand.

Tests marked ``exclusive`` need the GPU's memory, or the machine, for themselves: run them with ``-m exclusive`` and one
process, and the others with ``-m "not exclusive"`` and as many as there are cores.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hf_flash_plus.coverage.memory import out_of_memory

from . import memory
from .recording import GpuRecord

HERE = Path(__file__).parent
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hf_flash_plus", "GPU test record")
    group.addoption("--record-file", default=None, help="write the record of the GPU run to this file")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # with pytest-xdist only the controller sees all results
        return
    path = config.getoption("--record-file", default=None)
    if path:
        config.pluginmanager.register(GpuRecord([Path(path)]), "hf_flash_plus_gpu_record")
    if "HF_FLASH_PLUS_FUZZ_EXAMPLES" in os.environ:  # one seed for all processes, which share what they compile
        os.environ.setdefault("HF_FLASH_PLUS_FUZZ_SEED", str(random.SystemRandom().randrange(2**32)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is a GPU test, marked or not."""
    missing = _missing_reason()
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


def _missing_reason() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"needs a CUDA device: torch {torch.__version__} is built without CUDA"
    return "needs a CUDA device: torch sees none"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Tests share the GPU's memory: one that finds none waits for the others, and is repeated once."""
    try:
        return (yield)
    except RuntimeError as problem:
        alone = not hasattr(item.config, "workerinput") or item.get_closest_marker("exclusive")
        if alone or not out_of_memory(problem):
            raise
    item.user_properties.append(("repeated", "out of memory"))
    memory.wait_for_memory(12.0)
    item.runtest()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A process whose CUDA context is lost would fail every test that follows: it ends, and xdist starts another."""
    result = yield
    if item.stash.get(_FAILED, False) and hasattr(item.config, "workerinput") and not device_answers():
        print(f"\n{item.nodeid}: the device is lost to this process", file=sys.__stderr__, flush=True)
        os._exit(1)
    return result


def device_answers() -> bool:
    """Whether the device still works here: after an illegal access every later call in the process fails."""
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1.0)
    except RuntimeError as problem:
        return out_of_memory(problem)


Once = Callable[[str, Callable[[], str]], str]


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Run something once for all processes of pytest-xdist: the first does it, the others wait and get its words."""
    from filelock import FileLock  # torch needs it

    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root

    def run(name: str, work: Callable[[], str]) -> str:
        said = root / f"{name}.txt"
        with FileLock(str(said) + ".lock"):
            if not said.exists():
                said.write_text(work(), encoding="utf-8")
            return said.read_text(encoding="utf-8")

    return run


@pytest.fixture(autouse=True)
def _memory_of_the_last_test() -> Iterator[None]:
    """What a test leaves in torch's cache is memory that the other processes on the GPU do not have."""
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()
