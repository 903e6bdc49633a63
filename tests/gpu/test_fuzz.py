"""Random calls on a GPU, against float64: thousands with ``HF_FLASH_PLUS_FUZZ_EXAMPLES``, and a seed that is printed.

HF_FLASH_PLUS_FUZZ_EXAMPLES=2000 pytest tests/gpu/test_fuzz.py -s
HF_FLASH_PLUS_FUZZ_SEED=... repeats a run; HF_FLASH_PLUS_FUZZ_STRUCTURES=40 compiles more kernels
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from hf_flash_plus.providers import PROVIDERS

pytest.importorskip("hypothesis")
from hypothesis import given, seed

from tests.fuzz.calls import Call
from tests.fuzz.judge import check
from tests.fuzz.profiles import SEED, fuzzing
from tests.fuzz.strategies import KINDS, Limits

pytestmark = pytest.mark.gpu

#: Edges of the tiles of every size, and lengths beyond several tiles.
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 257, 400)
LIMITS = Limits(
    dtypes=("bfloat16", "float16", "bfloat16", "float32"),
    lengths=LENGTHS,
    dims=(64, 128, 40, 16, 96),
    heads=4,
    batch=3,
    structures=int(os.environ.get("HF_FLASH_PLUS_FUZZ_STRUCTURES", "8")),
    seed=SEED,
)

#: FlagGems compiles anew for every head count, batch, window and scale: seconds for an example.
PARTS = {"flaggems": 50}


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind: str, provider: str, record_property: Callable[[str, object], None]) -> None:
    reason = PROVIDERS[provider].unavailable_reason()
    if reason:
        pytest.skip(reason)
    served = []

    @seed(SEED)
    @fuzzing(25, PARTS.get(provider, 1))
    @given(call=KINDS[kind](LIMITS))
    def run(call: Call) -> None:
        served.append(check(call, (provider,), "cuda"))

    record_property("seed", SEED)
    try:
        run()
    finally:
        torch.cuda.synchronize()
        print(f"\nHF_FLASH_PLUS_FUZZ_SEED={SEED}: {provider}, {kind}: {len(served)} calls, {sum(served)} served")
    if provider == "triton":
        assert served and all(served), "our kernels serve every call"
