"""Random calls on the CPU, against float64: the providers ``reference`` and ``torch_sdpa``."""

from __future__ import annotations

import pytest
from hypothesis import given, seed

from .calls import Call
from .judge import check
from .profiles import SEED, fuzzing
from .strategies import KINDS, Limits

PROVIDERS = ("reference", "torch_sdpa")
LIMITS = Limits()
#: Examples in CI; a cached call is compared slot by slot, in Python.
EXAMPLES = {"flash": 120, "flash_packed": 40, "masked": 120, "varlen": 80, "cached": 80}


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind: str, record_property: object) -> None:
    served = []

    @seed(SEED)
    @fuzzing(EXAMPLES[kind])
    @given(call=KINDS[kind](LIMITS))
    def run(call: Call) -> None:
        served.append(check(call, PROVIDERS, "cpu"))

    print(f"HF_FLASH_PLUS_FUZZ_SEED={SEED}")
    run()
    assert served and min(served) >= 1, "reference serves every call"
    assert sum(served) > len(served), "torch_sdpa serves some"
