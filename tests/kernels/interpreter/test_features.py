"""Every feature, and pairs of features, forward and backward against float64, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from hf_flash_plus.providers.triton import TritonProvider
from tests.kernels.cases import FEATURES, Case, check

PROVIDER = TritonProvider()


def _ids(case: Case) -> str:
    return str(case)


#: Features that read or compute something in the dtype of the call, and one mask: also in half precision.
ALSO_HALF = ("packed", "bias", "key_bias", "low_bias", "softcap", "dropout")
SINGLE = [Case((name,)) for name in FEATURES] + [Case((name,), dtype=torch.float16) for name in ALSO_HALF]


@pytest.mark.parametrize("case", SINGLE, ids=_ids)
def test_feature(case: Case) -> None:
    check(PROVIDER, case)


#: One mask of each kind beside one other term of each kind, and the masks that meet each other.
PAIRS = [
    ("causal", "window"),
    ("causal", "packed"),
    ("window", "documents"),
    ("causal", "holes"),
    ("packed", "key_mask"),
    ("packed", "bool_bias"),
    ("window", "key_mask"),
    ("causal", "bias"),
    ("packed", "key_bias"),
    ("key_mask", "head_bias"),
    ("causal", "alibi"),
    ("packed", "positions"),
    ("bool_bias", "alibi"),
    ("causal", "softcap"),
    ("left_window", "softcap"),
    ("intervals", "softcap"),
    ("bias", "softcap"),
    ("alibi", "softcap"),
    ("left_window", "sinks"),
    ("packed", "sinks"),
    ("bool_bias", "sinks"),
    ("nothing", "sinks"),
    ("intervals", "row_sinks"),
    ("softcap", "sinks"),
    ("causal", "dropout"),
    ("left_padding", "dropout"),
    ("holes", "dropout"),
    ("bias", "dropout"),
    ("softcap", "dropout"),
    ("sinks", "dropout"),
]


@pytest.mark.parametrize("features", PAIRS, ids="+".join)
def test_pair(features: tuple[str, str]) -> None:
    check(PROVIDER, Case(features))


def test_everything_at_once() -> None:
    features = ("causal", "window", "packed", "key_mask", "bias", "positions", "softcap", "row_sinks", "dropout")
    check(PROVIDER, Case(features, seqlen_q=49, seqlen_k=49))
