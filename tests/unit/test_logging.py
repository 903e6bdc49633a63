"""What is logged: one DEBUG line a call, one INFO a process for a fallback, nothing when off."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus import dispatch, ops, settings, use_provider

CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (settings.USE_FLAGGEMS, settings.PROVIDER):
        monkeypatch.delenv(name, raising=False)
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


def records(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("hf_flash_plus") and r.levelno == level]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(2, 5, 4, 8, dtype=dtype),
        torch.randn(2, 7, 2, 8, dtype=dtype),
        torch.randn(2, 7, 2, 16, dtype=dtype),
    )


def test_debug_is_one_line_a_call_that_says_everything(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors(torch.bfloat16)
    with caplog.at_level(logging.DEBUG, "hf_flash_plus"):
        hfp.flash_attn_func(q, k, v, causal=True, window_size=(3, -1))
        (line,) = records(caplog, logging.DEBUG)
        assert "\n" not in line
        for part in ("flash_attn_func", "(2, 5, 4, 8)", "(2, 7, 2, 8)", "(2, 7, 2, 16)", "bfloat16", "cpu"):
            assert part in line, line
        assert "causal+window" in line and "torch_sdpa" in line
        assert "FLASH_ATTENTION_USE_FLAGGEMS=TRUE" in line, "why that provider"
        hfp.flash_attn_func(q, k, v)
        assert len(records(caplog, logging.DEBUG)) == 2, "every call has its line, not only the first of its kind"


def test_debug_names_each_function_its_mask_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 2, 8)
    dense = x[None]
    calls = {
        "flash_attn_func": (lambda: hfp.flash_attn_func(dense, dense, dense, dropout_p=0.25), "full"),
        "flash_attn_qkvpacked_func": (lambda: hfp.flash_attn_qkvpacked_func(torch.stack([dense] * 3, 2)), "full"),
        "flash_attn_kvpacked_func": (
            lambda: hfp.flash_attn_kvpacked_func(dense, torch.stack([dense] * 2, 2), causal=True),
            "causal",
        ),
        "flash_attn_varlen_func": (lambda: hfp.flash_attn_varlen_func(x, x, x, CU, CU, 3, 3), "packed"),
        "flash_attn_varlen_qkvpacked_func": (
            lambda: hfp.flash_attn_varlen_qkvpacked_func(torch.stack([x] * 3, 1), CU, 3),
            "packed",
        ),
        "flash_attn_varlen_kvpacked_func": (
            lambda: hfp.flash_attn_varlen_kvpacked_func(x, torch.stack([x] * 2, 1), CU, CU, 3, 3),
            "packed",
        ),
        "flash_attn_with_kvcache": (
            lambda: hfp.flash_attn_with_kvcache(dense, dense.clone(), dense.clone(), cache_seqlens=CU[1:2]),
            "intervals",
        ),
    }
    with caplog.at_level(logging.DEBUG, "hf_flash_plus"):
        for name, (call, mask) in calls.items():
            caplog.clear()
            call()
            (line,) = records(caplog, logging.DEBUG)
            assert line.startswith(name + ":") and f"mask {mask}" in line, line
        caplog.clear()
        with use_provider("reference"):
            hfp.flash_attn_func(dense, dense, dense)
        monkeypatch.setenv(settings.PROVIDER, "torch_sdpa")
        hfp.flash_attn_func(dense, dense, dense)
        first, second = records(caplog, logging.DEBUG)
        assert "reference" in first and "forced" in first
        assert "torch_sdpa" in second and "forced" in second


def test_fallback_is_said_once_at_info_with_the_reasons(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = tensors()
    with caplog.at_level(logging.INFO, "hf_flash_plus"):
        hfp.flash_attn_func(q, k, v)
        (line,) = records(caplog, logging.INFO)
        assert line.startswith("torch_sdpa serves on cpu") and "flaggems: " in line
        for causal in (False, True):  # new signatures, the same fallback
            hfp.flash_attn_func(q, k, v, causal=causal)
            hfp.flash_attn_func(q.half(), k.half(), v.half(), causal=causal)
        assert len(records(caplog, logging.INFO)) == 1
        assert records(caplog, logging.DEBUG) == []
        hfp.flash_attn_func(q, k, v, softcap=1.0)  # another provider stands in: that is news
        assert [line.split()[0] for line in records(caplog, logging.INFO)] == ["torch_sdpa", "reference"]


def test_no_fallback_no_info(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    monkeypatch.setenv(settings.USE_FLAGGEMS, "FALSE")
    with caplog.at_level(logging.INFO, "hf_flash_plus"):
        hfp.flash_attn_func(q, k, v)  # torch_sdpa is the CUDA path's own
        with use_provider("reference"):
            hfp.flash_attn_func(q, k, v)
    assert records(caplog, logging.INFO) == []


def test_nothing_is_formatted_when_off(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the line must not be made when nobody reads it")

    monkeypatch.setattr(ops, "_debug", fail)
    q, k, v = tensors()
    with caplog.at_level(logging.WARNING, "hf_flash_plus"):
        hfp.flash_attn_func(q, k, v)
        hfp.flash_attn_func(q, k, v, softcap=1.0)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, "hf_flash_plus"), pytest.raises(AssertionError, match="nobody"):
        hfp.flash_attn_func(q, k, v)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    q, k, v = tensors()
    hfp.flash_attn_func(q, k, v, causal=True)
    hfp.flash_attn_func(q, k, v, softcap=1.0)
    assert capfd.readouterr() == ("", "")
