"""Random calls on a GPU, against float64: thousands with ``HF_FLASH_PLUS_FUZZ_EXAMPLES``, and a seed that is printed.

HF_FLASH_PLUS_FUZZ_EXAMPLES=2000 HF_FLASH_PLUS_FUZZ_PARTS=4 pytest tests/gpu/test_fuzz.py -n 14 --dist worksteal
HF_FLASH_PLUS_FUZZ_SEED=... repeats a run; HF_FLASH_PLUS_FUZZ_STRUCTURES=40 compiles more kernels

The examples of a kind are dealt to so many parts, with seeds and structures of their own: parts are for processes, none
of which compiles what another does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

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
PARTS = int(os.environ.get("HF_FLASH_PLUS_FUZZ_PARTS", "1"))

#: A folder for the call that each test is at: where a process crashes, its file stays.
CALLS = os.environ.get("HF_FLASH_PLUS_FUZZ_CALLS", "")

#: One example in so many. FlagGems compiles anew for every head count, batch, window and scale: seconds for an example.
#: flash-attn 4 compiles every structure in every process.
RARE = {"flaggems": 100, "flash_attn": 20}
CASES = [
    (provider, kind, part)
    for provider in ("triton", "flaggems", "flash_attn", "torch_sdpa")  # the slowest first
    for part in range(1 if provider in RARE else PARTS)
    for kind in KINDS
]


@pytest.mark.parametrize("provider, kind, part", CASES)
def test_random_calls(provider: str, kind: str, part: int, record_property: Callable[[str, object], None]) -> None:
    reason = PROVIDERS[provider].unavailable_reason()
    if reason:
        pytest.skip(reason)
    served: list[int] = []
    current = Path(CALLS, f"{provider}-{kind}-{part}.py") if CALLS else None
    limits = LIMITS if provider in RARE else replace(LIMITS, part=part, parts=PARTS)

    @seed(SEED + part)
    @fuzzing(25, RARE.get(provider, PARTS))
    @given(call=KINDS[kind](limits))
    def run(call: Call) -> None:
        if current is not None:
            current.write_text(call.code(provider, "cuda"), encoding="utf-8")
        served.append(check(call, (provider,), "cuda"))

    passed, failure = False, {}
    try:
        run()
        passed = True
    except BaseException as problem:  # a run that is cut off prints no summary: the record must say how to repeat it
        failure = {"failure": "\n\n".join(str(one)[-4000:] for one in _all_of(problem))}
        raise
    finally:
        if current is not None:
            current.unlink(missing_ok=True)
        found = {"provider": provider, "kind": kind, "seed": SEED, "part": part,
                 "calls": len(served), "served": sum(served), "passed": passed, **failure}  # fmt: skip
        record_property("random_calls", found)
        print(f"\n{found}")
    if provider == "triton":
        assert served and all(served), "our kernels serve every call"


def test_every_provider_is_asked() -> None:
    assert {provider for provider, _, _ in CASES} == set(PROVIDERS) - {"reference"}


def _all_of(problem: BaseException) -> list[BaseException]:
    """Hypothesis raises several failures as a group."""
    inner = getattr(problem, "exceptions", None)
    return [problem] if inner is None else [leaf for one in inner for leaf in _all_of(one)]
