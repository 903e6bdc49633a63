"""These tests run the kernels in Triton's interpreter, on the CPU; without ``TRITON_INTERPRET=1`` they are skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _missing_reason() -> str | None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "run as: TRITON_INTERPRET=1 pytest tests/kernels/interpreter"
    try:
        import numpy
        import triton
    except ImportError as error:
        return f"needs triton and numpy: {error}"

    def version(module: object) -> tuple[int, ...]:
        return tuple(int(part) for part in module.__version__.split(".")[:2])

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} breaks on loops from numpy 2.4 on ({numpy.__version__})"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing_reason()
    if reason:
        for item in items:
            if HERE in Path(item.path).parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def _bounds() -> Iterator[None]:
    """No kernel reads or writes outside of its arguments' memory, in any of these tests."""
    if _missing_reason():
        yield
        return
    from .bounds import checked

    with checked():
        yield
