"""The carrier that our mask function returns says, bit for bit, what Transformers' own dense mask says."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache, masking_utils

import hf_flash_plus  # noqa: F401
from hf_flash_plus.integration import carrier, mask_interface
from hf_flash_plus.integration.mask_interface import flash_plus_mask
from hf_flash_plus.masks import visible

LENGTH = 24
CAUSAL = masking_utils.causal_mask_function
FULL = masking_utils.bidirectional_mask_function
BLOCKS = torch.tensor([[-1] * 3 + [0] * 5 + [-1] * 2 + [1] * 4 + [2] * 3 + [-1] * 7, [-1] * 8 + [0] * 9 + [-1] * 7])
PACKED = torch.tensor([[0] * 7 + [1] * 1 + [2] * 16, [0] * 20 + [1] * 4])
POSITIONS = torch.tensor([[*range(7), 0, *range(16)], [*range(20), *range(4)]])

FUNCTIONS = {
    "causal": CAUSAL,
    "full": FULL,
    "window": masking_utils.sliding_window_causal_mask_function(5),
    "window_1": masking_utils.sliding_window_causal_mask_function(1),
    "bidirectional_window": masking_utils.sliding_window_bidirectional_mask_function(4),
    "chunked": masking_utils.chunked_causal_mask_function(7, torch.tensor([0, 3])),
    "blocks": masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(BLOCKS)),
    "window_of_blocks": masking_utils.and_masks(
        masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(BLOCKS)), masking_utils.sliding_window_overlay(6)
    ),
    "blocks_beside_window": masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(4), masking_utils.blockwise_overlay(BLOCKS)
    ),
    "packed": masking_utils.and_masks(masking_utils.packed_sequence_mask_function(PACKED), CAUSAL),
    "packed_window": masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(PACKED), masking_utils.sliding_window_causal_mask_function(5)
    ),
}
if hasattr(masking_utils, "packed_sequence_compatibility_function"):
    FUNCTIONS["packed_chunked"] = masking_utils.packed_sequence_compatibility_function(
        masking_utils.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.long)), POSITIONS, PACKED
    )


@pytest.fixture(autouse=True)
def carriers_everywhere(monkeypatch) -> None:
    """Single rows are carried, too, as they are on accelerators."""
    monkeypatch.setattr(mask_interface, "DENSE_ONE_ROW", frozenset())


def test_single_rows_stay_dense_on_the_cpu(monkeypatch) -> None:
    monkeypatch.undo()
    dense, ours, _ = both(CAUSAL, pads("left"), q_length=1, q_offset=LENGTH - 1)
    assert ours.dtype == torch.bool and torch.equal(ours, dense)


def pads(kind: str) -> torch.Tensor | None:
    if kind == "none":
        return None
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    if kind == "left":
        mask[1, :5] = False
    elif kind == "right":
        mask[1, -6:] = False
    elif kind == "holes":
        mask[1, 10:12] = False
        mask[0, 0] = mask[0, 20] = False
    elif kind == "empty":
        mask[1] = False
    return mask


def both(function, padding, **geometry):
    arguments = dict(
        batch_size=2,
        q_length=LENGTH,
        kv_length=LENGTH,
        q_offset=0,
        kv_offset=0,
        mask_function=function,
        attention_mask=padding,
        device="cpu",
    )
    arguments.update(geometry)
    dense = masking_utils.sdpa_mask(
        **arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=False
    )
    return dense, flash_plus_mask(**arguments), arguments


def decoded(mask: torch.Tensor, rows: int, keys: int) -> torch.Tensor:
    result = visible(carrier.decode(mask, rows, keys).mask, rows, keys, mask.device)
    return torch.ones(1, 1, rows, keys, dtype=torch.bool) if result is None else result


@pytest.mark.parametrize("padding", ("none", "left", "right", "holes", "empty"))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("attached", (True, False), ids=("attached", "from_data"))
def test_equals_the_dense_mask(name: str, padding: str, attached: bool) -> None:
    dense, ours, _ = both(FUNCTIONS[name], pads(padding))
    assert ours.dtype == torch.int32 and ours.dim() == 4, "recognised, so a carrier"
    if not attached:
        ours = ours.clone()  # loses the attribute, as .to(device) or an index would
    assert torch.equal(decoded(ours, LENGTH, LENGTH).expand_as(dense), dense)


@pytest.mark.parametrize("padding", ("all", "left", "right", "holes", "empty"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_look_at_the_padding(name: str, padding: str, monkeypatch) -> None:
    """As on a GPU: no key mask where it has no holes, flags alone where there is no padding; the mask is the same."""
    monkeypatch.setattr(mask_interface, "LOOK_AT_PADDING", frozenset({"cpu"}))
    dense, ours, _ = both(FUNCTIONS[name], pads(padding))
    for version in (ours, ours.clone()):
        assert torch.equal(decoded(version, LENGTH, LENGTH).expand_as(dense), dense)
    mask = carrier.decode(ours, LENGTH, LENGTH).mask
    assert (mask.key_mask is not None) == (padding == "holes")
    if padding == "all" and name in ("causal", "full", "window", "bidirectional_window"):
        assert mask.row_intervals is None


@pytest.mark.parametrize("padding", ("none", "left", "holes"))
@pytest.mark.parametrize("name", ("causal", "window", "chunked", "blocks"))
@pytest.mark.parametrize("rows, start", ((1, 23), (1, 9), (4, 12)))
@pytest.mark.parametrize("tensor_offset", (False, True), ids=("int", "tensor"))
def test_queries_behind_a_cache(name: str, padding: str, rows: int, start: int, tensor_offset: bool) -> None:
    """Decoding and prefix continuation, with a growing cache or (tensor offset) a static one with unwritten slots."""
    keys = LENGTH if tensor_offset else start + rows
    mask = pads(padding)
    dense, ours, _ = both(
        FUNCTIONS[name],
        None if mask is None else mask[:, : start + rows],
        q_length=rows,
        kv_length=keys,
        q_offset=torch.tensor(start) if tensor_offset else start,
    )
    for version in (ours, ours.clone()):
        assert torch.equal(decoded(version, rows, keys).expand_as(dense), dense)


@pytest.mark.parametrize("padding", ("none", "left"))
def test_sliding_cache_with_offsets(padding: str) -> None:
    """A sliding cache holds the last keys only: keys begin at an absolute index of their own."""
    mask = pads(padding)
    dense, ours, _ = both(
        FUNCTIONS["window"], None if mask is None else mask[:, :13], q_length=1, kv_length=8, q_offset=12, kv_offset=5
    )
    assert torch.equal(decoded(ours.clone(), 1, 8).expand_as(dense), dense)


def test_unknown_functions_stay_dense() -> None:
    def strided(batch, head, q, kv):
        return (q - kv) % 2 == 0

    dense, ours, _ = both(masking_utils.and_masks(CAUSAL, strided), None)
    assert ours.dtype == torch.bool and torch.equal(ours, dense)
    disjoint = masking_utils.or_masks(strided, masking_utils.blockwise_overlay(BLOCKS))
    dense, ours, _ = both(disjoint, None)
    assert ours.dtype == torch.bool and torch.equal(ours, dense)


def test_blocks_that_come_back_are_refused() -> None:
    ids = torch.tensor([[0, 0, -1, 0, 0] + [-1] * (LENGTH - 5)] * 2)
    function = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids))
    with pytest.raises(RuntimeError, match="not contiguous"):
        both(function, None)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[:, 2] = False  # padding inside a block does not split it
    dense, ours, _ = both(function, padding)
    got = decoded(ours.clone(), LENGTH, LENGTH)
    rows = padding[0]
    assert torch.equal(got[:, :, rows], dense[:, :, rows])


def test_mask_modified_in_place_is_refused() -> None:
    _, ours, _ = both(CAUSAL, pads("left"))
    ours[..., 0] = 0
    with pytest.raises(ValueError, match="changed in place"):
        carrier.decode(ours, LENGTH, LENGTH)


def test_reshaped_mask_is_refused() -> None:
    _, ours, _ = both(CAUSAL, pads("left"))
    with pytest.raises(ValueError, match="the model has reshaped the one made"):
        carrier.decode(ours[:, :, :5].clone(), LENGTH, LENGTH)
    with pytest.raises(ValueError, match="the model has reshaped the one made"):
        carrier.decode(ours[..., :1].clone(), LENGTH, LENGTH)


@pytest.mark.parametrize("length", [4, 12])
def test_int32_masks_of_zeros_and_ones_are_refused(length: int) -> None:
    """One of four keys has the shape of a carrier."""
    mine = torch.tril(torch.ones(length, length, dtype=torch.int32))[None, None]
    with pytest.raises(ValueError, match=r"A mask of your own has to be boolean \(True is visible\) or floating"):
        carrier.decode(mine, length, length)


def test_copied_carriers_are_not_taken_for_them() -> None:
    holes = torch.ones(2, LENGTH, dtype=torch.bool)
    holes[:, 3] = False
    _, ours, _ = both(CAUSAL, holes)
    assert ours.shape[-1] > 2
    carrier.decode(ours.clone(), LENGTH, LENGTH)


def test_short_sequences_get_dense_masks() -> None:
    """A carrier wider than the keys could be cut by models that slice ``[..., :kv_len]``."""
    dense, ours, _ = both(CAUSAL, pads("left")[:, :2], q_length=2, kv_length=2)
    assert ours.dtype == torch.bool and torch.equal(ours, dense)


def test_plain_masks_keep_their_flags() -> None:
    """The fast path: no tensor is read when flags say it all."""
    for function, causal, window in (
        (CAUSAL, True, (-1, -1)),
        (FULL, False, (-1, -1)),
        (FUNCTIONS["window"], True, (4, -1)),
    ):
        mask = carrier.decode(both(function, None)[1], LENGTH, LENGTH).mask
        assert mask.row_intervals is None and mask.causal is causal and mask.window == window


def test_no_host_synchronisation() -> None:
    """Building a mask on the meta device would raise if a value were read back."""
    for name, function in FUNCTIONS.items():
        if name in ("causal", "full", "window", "bidirectional_window"):
            for padding in (None, torch.ones(2, LENGTH, dtype=torch.bool, device="meta")):
                mask = flash_plus_mask(2, LENGTH, LENGTH, 0, 0, function, padding, device="meta")
                assert mask.device.type == "meta" and mask.dtype == torch.int32


@pytest.mark.parametrize("cache", (None, DynamicCache, StaticCache))
def test_through_transformers(cache) -> None:
    """``create_causal_mask`` with our name returns our carrier, never None."""
    config = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config._attn_implementation = "flash_plus"
    arguments = dict(config=config) if cache is DynamicCache else dict(config=config, max_cache_len=32)
    mask = masking_utils.create_causal_mask(
        config, torch.zeros(2, 6, 32), None, past_key_values=None if cache is None else cache(**arguments)
    )
    assert carrier.is_carrier(mask)
