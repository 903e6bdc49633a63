"""How many examples, and with which seed: from the environment, so that a run can be repeated and made longer.

``HF_FLASH_PLUS_FUZZ_EXAMPLES``: examples of each kind of call; without it a number that CI has time for.
``HF_FLASH_PLUS_FUZZ_SEED``: the seed; without it always the same examples in CI, and a fresh, printed seed where
more examples are asked for.
``HF_FLASH_PLUS_FUZZ_STRUCTURES``: on a GPU, how many different structures (each compiles its kernels).
"""

from __future__ import annotations

import os
import random
from typing import Any

from hypothesis import HealthCheck, Phase, settings


def examples(default: int) -> int:
    return int(os.environ.get("HF_FLASH_PLUS_FUZZ_EXAMPLES", default))


def _chosen_seed() -> int:
    given = os.environ.get("HF_FLASH_PLUS_FUZZ_SEED")
    if given is not None:
        return int(given)
    return random.SystemRandom().randrange(2**32) if "HF_FLASH_PLUS_FUZZ_EXAMPLES" in os.environ else 20260401


#: The seed of this run, one for all tests of the process.
SEED = _chosen_seed()


def fuzzing(default: int, part: int = 1) -> settings:
    """The settings of a fuzz test that runs ``default`` examples in CI; one in ``part`` of them where it is slow."""
    options: dict[str, Any] = {
        "max_examples": max(5, examples(default) // part),
        "deadline": None,
        "database": None,  # nothing is written; the printed code is the record of a failure
        "print_blob": False,
        "suppress_health_check": list(HealthCheck),
        "phases": (Phase.generate, Phase.shrink),
    }
    return settings(**options)
