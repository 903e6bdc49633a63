"""All layers of a forward get the same row intervals, with which kernels keep what they work out from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_flash_plus import ops
from hf_flash_plus.interval_cache import shared

from .tiny import build, ids, padding

LENGTH = 12
LENGTHS = torch.tensor([0, 5, 12], dtype=torch.int32)
DOCUMENTS = torch.tensor([[*range(5), *range(7)]])
CASES: dict[str, dict[str, Any]] = {
    "padded": dict(input_ids=ids(2, LENGTH), attention_mask=padding("left", 2, LENGTH), use_cache=False),
    "packed": dict(input_ids=ids(1, LENGTH), position_ids=DOCUMENTS, use_cache=False),
    "packed beside a cache": dict(input_ids=ids(1, LENGTH), position_ids=DOCUMENTS, use_cache=True),
    "flattened": dict(
        input_ids=ids(1, LENGTH), position_ids=DOCUMENTS, use_cache=False, max_length_q=7, max_length_k=7,
        cu_seq_lens_q=LENGTHS, cu_seq_lens_k=LENGTHS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layers_share_what_was_worked_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    attention = ops.attention

    def watching(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(shared(inputs.mask.row_intervals))
        return attention(inputs, *args, **kwargs)

    monkeypatch.setattr(ops, "attention", watching)
    model = build("llama", "flash_plus", num_hidden_layers=3)
    with torch.no_grad():
        model(**CASES[case])
        assert len(found) == 3 and found[0] is not None
        assert all(each is found[0] for each in found)
        model(**CASES[case])
    if case != "flattened":  # whose caller keeps the tensors of lengths that the mask is kept with
        assert found[3] is not found[0], "another forward has another mask"
