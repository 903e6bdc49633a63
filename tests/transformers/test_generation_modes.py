"""The rarer ways to generate give eager's tokens."""

from __future__ import annotations

import pytest

from .modes import MODES, NAMES, assert_equal, run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_eager(name: str, mode: str) -> None:
    assert_equal(mode, *run(name, mode))
