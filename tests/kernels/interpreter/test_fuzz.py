"""Random calls of the provider ``triton`` in Triton's interpreter: a few, because each takes most of a second."""

from __future__ import annotations

import pytest
from hypothesis import given, seed

from tests.fuzz.calls import Call
from tests.fuzz.judge import check
from tests.fuzz.profiles import SEED, fuzzing
from tests.fuzz.strategies import KINDS, Limits

#: Edges of the interpreter's tiles (32 x 32).
LIMITS = Limits(dtypes=("float32", "float16"), lengths=(0, 1, 16, 17, 31, 32, 33, 40), heads=2, batch=2)


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind: str) -> None:
    served = []

    @seed(SEED)
    @fuzzing(8)
    @given(call=KINDS[kind](LIMITS))
    def run(call: Call) -> None:
        served.append(check(call, ("triton",), "cpu"))

    print(f"HF_FLASH_PLUS_FUZZ_SEED={SEED}")
    run()
    assert served and all(served), "our kernels serve every call"
