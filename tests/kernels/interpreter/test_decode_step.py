"""The short way of a decoding step: the same result as the ordinary way, while the cache grows and settings change."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import masking_utils

from hf_flash_plus.dispatch import use_provider
from hf_flash_plus.integration import carrier, decoding, mask_interface
from hf_flash_plus.integration.attention import flash_plus_attention
from hf_flash_plus.masks import AttentionMask, key_mask_intervals, visible

padding = pytest.importorskip("hf_flash_plus.kernels.padding").padding
decode_launch = pytest.importorskip("hf_flash_plus.kernels.decode_launch")


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize("row_start", [0, 9])
@pytest.mark.parametrize("row_end", [0, 2])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("offset,length,seqlen_k", [(0, 5, 5), (0, 40, 40), (3, 43, 40), (0, 2100, 2100), (2, 30, 37)])
def test_padding_kernel(offset: int, length: int, seqlen_k: int, row_start: int, row_end: int, on_device: bool) -> None:
    """The carrier and its holes as torch's operations make them; the last ``row_end`` keys come after the row."""
    torch.manual_seed(0)
    keep = torch.rand(5, length + 2)[:, 2:] > 0.4  # rows further apart than they are long
    keep[1] = True
    keep[2] = False
    keep[3, : length // 2], keep[3, length // 2 :] = False, True
    row = offset + seqlen_k - 1 - row_end
    window = seqlen_k - row_end - row_start
    made = padding(keep, seqlen_k, offset, torch.tensor([row]) if on_device else row, window)
    here = torch.nn.functional.pad(keep, (0, seqlen_k))[:, offset : offset + seqlen_k]
    index = torch.arange(seqlen_k)
    start, end, holes = key_mask_intervals(here & (index >= row_start) & (index < seqlen_k - row_end))
    spans = torch.stack((start, end), dim=-1)[:, None, :]
    expected = carrier.encode(spans, here, holes, carrier.Carried(AttentionMask()))
    assert torch.equal(made.carrier, expected)
    assert made.holes is not None and torch.equal(made.holes, holes) and torch.equal(made.intervals, spans)


@pytest.mark.parametrize("row,window,span", [(7, 2**30, [0, 8]), (7, 3, [5, 8]), (30, 4, [27, 20])])
def test_padding_kernel_without_padding(row: int, window: int, span: list[int]) -> None:
    made = padding(None, 20, 0, torch.tensor(row, dtype=torch.int32), window)
    assert made.holes is None and made.carrier.tolist() == [[[span]]]


KEEP = torch.ones(2, 40, dtype=torch.bool)
KEEP[1, :13] = KEEP[1, 30:32] = False


@pytest.mark.parametrize("padding_mask", [None, KEEP], ids=["none", "holes"])
@pytest.mark.parametrize("q_offset", [39, 29, torch.tensor(39), torch.tensor([29])], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function(7),
        masking_utils.bidirectional_mask_function,  # cross-attention: its row may stand anywhere
    ],
    ids=["causal", "window", "full"],
)
def test_masks_of_one_row_equal_transformers(
    function: Any, q_offset: int | torch.Tensor, padding_mask: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that decides on the mask of a decoding step on a GPU, with and without padding, with offsets on the
    device (static caches) and not."""
    monkeypatch.setattr(mask_interface, "DENSE_ONE_ROW", frozenset())
    monkeypatch.setattr(mask_interface, "_launches_on", lambda device: True)
    made: list[bool] = []
    one_row = mask_interface._one_row

    def watched(*arguments: Any) -> torch.Tensor | None:
        found = one_row(*arguments)
        made.append(found is not None)
        return found

    monkeypatch.setattr(mask_interface, "_one_row", watched)
    options = {"batch_size": 2, "q_length": 1, "kv_length": 40, "q_offset": q_offset, "kv_offset": 0}
    options |= {"mask_function": function, "attention_mask": padding_mask, "device": torch.device("cpu")}
    dense = masking_utils.sdpa_mask(
        **options, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=False
    )
    ours = mask_interface.flash_plus_mask(**options)
    mask = carrier.decode(ours, 1, 40).mask
    seen = visible(mask, 1, 40, torch.device("cpu"))
    assert torch.equal(torch.ones_like(dense) if seen is None else seen.expand_as(dense), dense)
    full, causal = masking_utils.bidirectional_mask_function, masking_utils.causal_mask_function
    moving = isinstance(q_offset, torch.Tensor)
    flags_do = padding_mask is None and not moving and q_offset == 39 and function in (full, causal)
    assert made == ([] if flags_do else [not (moving and function is full)])


@pytest.mark.parametrize("padded", [True, False])
def test_masks_go_with_their_carriers(padded: bool) -> None:
    """A new one comes with every token: none may stay behind."""
    with torch.no_grad():
        made = padding(torch.ones(2, 40, dtype=torch.bool) if padded else None, 40, 0, torch.tensor(39))
        mask = AttentionMask(row_intervals=made.intervals, key_holes=made.holes)
        carried = carrier.Carried(mask)
        mask_carrier = carrier.attach(made.carrier, carried)
    gone = weakref.ref(carried)
    del made, mask, carried
    assert gone() is not None
    del mask_carrier
    gc.collect()
    assert gone() is None


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each candidate took the short way."""
    decoding.forget()
    results: list[bool] = []
    serve = decoding.serve

    def watch(*arguments: Any) -> Any:
        out = serve(*arguments)
        results.append(out is not None)
        return out

    monkeypatch.setattr(decoding, "serve", watch)
    return results


def _tensors(seqlen_k: int, dim: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seqlen_k)
    return torch.randn(2, 4, 1, dim), torch.randn(2, 2, seqlen_k, dim), torch.randn(2, 2, seqlen_k, 24)


def _padding(seqlen_k: int, kind: str = "intervals") -> torch.Tensor:
    intervals = torch.tensor([[[0, seqlen_k]], [[3, seqlen_k]]], dtype=torch.int32)
    if kind == "intervals":
        return carrier.encode(intervals, None, None, carrier.Carried(AttentionMask(row_intervals=intervals)))
    keep = torch.ones(2, seqlen_k, dtype=torch.bool)
    keep[1, :3] = False
    if kind == "holes":
        keep[1, 7:9] = keep[1, -4] = False
    made = padding(keep, seqlen_k, 0, seqlen_k - 1)
    mask = AttentionMask(row_intervals=made.intervals, key_mask=keep, key_holes=made.holes)
    return carrier.attach(made.carrier, carrier.Carried(mask))


def _call(seqlen_k: int, provider: str, padded: str = "", **options: Any) -> torch.Tensor:
    mask = _padding(seqlen_k, padded) if padded else None
    with torch.no_grad(), use_provider(provider):
        return flash_plus_attention(Layer(), *_tensors(seqlen_k), mask, **options)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padded": "intervals"},
        {"padded": "mask"},
        {"padded": "holes"},
        {"sliding_window": 40},
        {"softcap": 3.0},
        {"scaling": 0.4},
        {"padded": "holes", "softcap": 2.0},
    ],
    ids=str,
)
def test_equals_the_ordinary_way(options: dict[str, Any], served: list[bool]) -> None:
    for seqlen_k in (20, 21, 33, 70, 129):  # the window is longer than the first caches
        expected = _call(seqlen_k, "reference", **options)
        served.clear()
        actual = _call(seqlen_k, "triton", **options)
        assert served == [seqlen_k > 20], "the first call prepares, the others use it"
        assert actual.shape == (2, 1, 4, 24)
        assert (actual - expected).abs().max() < 2e-6


def test_does_not_serve_what_it_does_not_know(served: list[bool]) -> None:
    for _ in range(2):
        _call(20, "triton")
    assert served == [False, True]
    served.clear()
    _call(20, "reference")  # another provider
    _call(20, "triton", softcap=1.0)
    _call(20, "triton", s_aux=torch.zeros(4))
    q, k, v = _tensors(20)
    with use_provider("triton"):
        flash_plus_attention(Layer(), q, k, v, None)  # gradients are enabled
        with torch.no_grad():
            flash_plus_attention(Layer(), q, k, v, None, is_causal=True, sliding_window=4)
            flash_plus_attention(Layer(), q, k.transpose(2, 3).contiguous().transpose(2, 3), v, None)
    assert served == [False] * 4
    with torch.no_grad(), use_provider("triton"), pytest.raises(ValueError, match="same seqlen"):
        flash_plus_attention(Layer(), q, k, v[:, :, :-1], None)


def test_a_changed_mask_is_an_error(served: list[bool]) -> None:
    _call(20, "triton", padded="mask")
    mask = _padding(20, "mask")
    mask += 1
    with torch.no_grad(), use_provider("triton"), pytest.raises(ValueError, match="changed in place"):
        flash_plus_attention(Layer(), *_tensors(20), mask)
