"""The provider ``flaggems`` without flag_gems: its reasons, its import, and how it calls what is right in FlagGems.

The double below stands for ``flag_gems.ops.attention`` 5.0.2: right where it is right, wrong or refusing where it is
not, so that a call that would come out wrong on a GPU comes out wrong here.
"""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_flash_plus import dispatch
from hf_flash_plus.cli.explain import build_signature
from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask, PackedSequences, varlen_mask
from hf_flash_plus.providers import PROVIDERS, flaggems
from hf_flash_plus.providers.flaggems import FlagGemsProvider

# --- availability and reasons ---


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What importlib.metadata finds: a verified flag_gems, a fitting triton; and a CUDA device."""
    found = {"flag_gems": "5.0.2", "triton": "3.6.0"}

    def version(name: str) -> str:
        if name not in found:
            raise flaggems.importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(flaggems.importlib.metadata, "version", version)
    monkeypatch.setattr(flaggems, "accelerator_type", lambda: "cuda")
    FlagGemsProvider._missing_reason.cache_clear()
    yield found
    FlagGemsProvider._missing_reason.cache_clear()


def module(monkeypatch: pytest.MonkeyPatch, contents: Any = None, error: BaseException | None = None) -> list[str]:
    """Put a flag_gems into the import system; returns the list of imports of it."""
    imports: list[str] = []

    def import_module(name: str) -> Any:
        imports.append(name)
        print("a library that prints at import")
        if error is not None:
            raise error
        return contents if contents is not None else types.SimpleNamespace()

    monkeypatch.setattr(flaggems.importlib, "import_module", import_module)
    return imports


def signature(**changes: Any) -> Any:
    return build_signature(shape=(2, 64, 8, 64), **changes)


def test_missing(versions: dict[str, str]) -> None:
    del versions["flag_gems"]
    provider = FlagGemsProvider()
    assert "not installed" in provider.unavailable_reason()
    assert provider.version() is None
    assert provider.not_supported_reasons(signature()) == [provider.unavailable_reason()]


def test_unverified_version_is_never_served(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    versions["flag_gems"] = "5.1.0"
    imports = module(monkeypatch)
    provider = FlagGemsProvider()
    assert provider.unavailable_reason() == "flag_gems 5.1.0 is not verified (verified: 5.0.2)"
    assert provider.version() == "5.1.0"
    monkeypatch.setitem(PROVIDERS, "flaggems", provider)
    monkeypatch.setenv("HF_FLASH_PLUS_PROVIDER", "flaggems")
    dispatch.clear_cache()
    with pytest.raises(dispatch.NoProviderError, match="not verified"):
        dispatch.select_provider(signature())
    assert not imports


@pytest.mark.parametrize("triton,word", [("3.9.0", "block pointers"), ("3.10.1", "block pointers"), (None, "triton")])
def test_triton(versions: dict[str, str], triton: str | None, word: str) -> None:
    if triton is None:
        del versions["triton"]
    else:
        versions["triton"] = triton
    assert word in FlagGemsProvider().unavailable_reason()


def test_no_device(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    imports = module(monkeypatch)
    monkeypatch.setattr(flaggems, "accelerator_type", lambda: None)
    assert "needs an accelerator" in FlagGemsProvider().unavailable_reason()
    assert not imports


def test_broken_device(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("driver/library version mismatch")

    monkeypatch.setattr(flaggems, "accelerator_type", broken)
    assert "mismatch" in FlagGemsProvider().unavailable_reason()


@pytest.mark.parametrize("error", [ImportError("no sqlalchemy"), RuntimeError("No device"), SystemExit(1)])
def test_broken_import_is_reported_once(
    versions: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    imports = module(monkeypatch, error=error)
    provider = FlagGemsProvider()
    for _ in range(3):
        reason = provider.unavailable_reason()
        assert f"cannot be imported ({type(error).__name__}: {error})" in reason
    assert imports == ["flag_gems.ops.attention"]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    assert capsys.readouterr().out == ""
    with pytest.raises(RuntimeError, match="cannot be imported"):
        provider.forward(AttentionInputs(*torch.zeros(3, 1, 4, 2, 32), 1.0))


def test_import_waits_for_a_tensor_on_the_device(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    imports = module(monkeypatch)
    provider = FlagGemsProvider()
    assert provider.not_supported_reasons(signature(device="cpu")) == ["serves tensors on cuda, these are on cpu"]
    assert not imports
    assert provider.not_supported_reasons(signature()) == []
    assert provider.not_supported_reasons(signature()) == []
    assert len(imports) == 1


def test_package_import_leaves_flag_gems_alone() -> None:
    assert "flag_gems" not in sys.modules


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"sinks": True}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
        ({"bias": "bool"}, "boolean"),
        ({"bias": "float"}, "additive"),
        ({"v_head_dim": 32}, "value head dimension"),
        ({"dtype": "fp32"}, "float32"),
        ({"alibi": True, "causal": True, "lse": True}, "softmax_lse"),
        ({"alibi": True, "causal": True, "training": True}, "softmax_lse"),
        ({"alibi": True, "intervals": True}, "ALiBi"),
    ],
    ids=str,
)
def test_declines(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], word: str
) -> None:
    module(monkeypatch)
    monkeypatch.setitem(PROVIDERS, "triton", Willing())
    reasons = FlagGemsProvider().not_supported_reasons(signature(**changes))
    assert len(reasons) == 1 and word in reasons[0]


@pytest.mark.parametrize("dim,word", [(16, "from 32"), (264, "up to 256"), (60, "multiple of 8")])
def test_head_dims(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, dim: int, word: str) -> None:
    module(monkeypatch)
    reasons = FlagGemsProvider().not_supported_reasons(build_signature(shape=(1, 8, 2, dim)))
    assert len(reasons) == 1 and word in reasons[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"causal": True},
        {"window": (5, 0), "softcap": 3.0, "kv_heads": 2, "lse": True},
        {"alibi": True, "causal": True},
        {"alibi": True, "lse": True},
        {"packed": True, "shape": (1, 64, 8, 64)},
        {"intervals": True, "key_mask": True},
        {"training": True, "deterministic": True},
    ],
    ids=str,
)
def test_serves(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    module(monkeypatch)
    monkeypatch.setitem(PROVIDERS, "triton", Willing())
    call = {"shape": (2, 64, 8, 64), **changes}
    assert FlagGemsProvider().not_supported_reasons(build_signature(**call)) == []


class Willing:
    """A provider ``triton`` that can do everything, or nothing."""

    name = "triton"

    def __init__(self, *reasons: str) -> None:
        self.reasons = list(reasons)

    def not_supported_reasons(self, signature: Any) -> list[str]:
        return self.reasons

    def auto_reasons(self, signature: Any) -> list[str]:
        return []


def test_training_needs_our_backward(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch)
    provider = FlagGemsProvider()
    monkeypatch.delitem(PROVIDERS, "triton", raising=False)
    assert "not there" in provider.not_supported_reasons(signature(training=True))[0]
    assert provider.not_supported_reasons(signature()) == []
    monkeypatch.setitem(PROVIDERS, "triton", Willing("it is Monday"))
    assert "it is Monday" in provider.not_supported_reasons(signature(training=True))[0]
    assert provider.backward_provider == "triton"
    with pytest.raises(TypeError, match="forwards only"):
        provider.backward(None, None, None, None, bias_grad=False, sinks_grad=False)


def test_automatic_selection(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps aside where our kernels are tuned and can serve, before anything is imported; else comes first."""
    imports = module(monkeypatch)
    provider = FlagGemsProvider()
    monkeypatch.setitem(PROVIDERS, "flaggems", provider)
    monkeypatch.setitem(PROVIDERS, "triton", Willing())
    monkeypatch.setattr(flaggems, "tuned_architecture", lambda: "sm90")

    def chosen(**changes: Any) -> str:
        dispatch.clear_cache()
        return dispatch.select_provider(signature(**changes)).provider.name

    assert chosen() == "triton" and not imports
    verdicts = {v.provider: v for v in dispatch.explain_signature(signature())}
    assert "sm90" in verdicts["flaggems"].steps_aside[0] and not verdicts["flaggems"].reasons
    with dispatch.use_provider("flaggems"):
        assert chosen() == "flaggems"
        assert not dispatch.explain_signature(signature())[0].steps_aside
    monkeypatch.setattr(flaggems, "tuned_architecture", lambda: None)
    assert chosen() == "flaggems"
    assert chosen(intervals=True) == "triton"
    monkeypatch.setitem(PROVIDERS, "triton", Willing("broken"))
    monkeypatch.setattr(flaggems, "tuned_architecture", lambda: "sm90")
    assert chosen() == "flaggems"
    dispatch.clear_cache()


def test_tuned_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flaggems.tuned_architecture() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, name in {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert flaggems.tuned_architecture() == name
    for capability in ((7, 5), (8, 6), (8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert flaggems.tuned_architecture() is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = types.SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert flaggems.tuned_architecture() == "gfx942"


def test_known_bad_names_versions_that_are_verified() -> None:
    assert all(set(bad.versions) & set(flaggems.VERIFIED) and bad.reason for bad in flaggems.KNOWN_BAD)


# --- the calls ---


def one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, left: int, right: int, slopes: Any, causal: bool
) -> tuple[Tensor, Tensor]:
    """One sequence ``(rows, heads, dim)``: output and log-sum-exp ``(heads, rows)``, +inf on empty rows."""
    assert scale > 0, "FlagGems' running maximum needs a positive scale"
    groups = q.shape[1] // k.shape[1]
    key, value = (t.double().repeat_interleave(groups, dim=1).transpose(0, 1) for t in (k, v))
    scores = q.double().transpose(0, 1) @ key.mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    rows, keys = q.shape[0], k.shape[0]
    diagonal = torch.arange(rows)[:, None] + keys - rows
    column = torch.arange(keys)[None]
    if slopes is not None:
        distance = (keys - 1 - column).expand(rows, -1) if causal else (diagonal - column).abs()
        scores = scores - slopes.double()[:, None, None] * distance
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen = seen & (column >= diagonal - left)
    if right >= 0:
        seen = seen & (column <= diagonal + right)
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1) if keys else torch.full(scores.shape[:2], -math.inf, dtype=torch.float64)
    out = scores.softmax(-1).nan_to_num(0.0) @ value
    return out.transpose(0, 1), torch.where(lse == -math.inf, math.inf, lse).float()


class Double:
    """``flag_gems.ops.attention`` 5.0.2 in PyTorch, with its faults."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: None, cu_k: None, max_q: int, max_k: int, dropout: float,
        causal: bool, debug: bool, *, scale: Any = None, softcap: float = 0.0, window_size_left: Any = None,
        window_size_right: Any = None, alibi_slopes: Any = None, disable_splitkv: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        self.calls.append("dense")
        assert disable_splitkv and not dropout and cu_q is cu_k is None and not debug
        assert q.stride(-1) == k.stride(-1) == 1 and k.stride() == v.stride()
        assert q.shape[0] == 1 or q.stride(0) % (q.shape[2] * q.shape[3]) == 0
        rows, keys = q.shape[1], k.shape[1]
        scale = scale or q.shape[-1] ** -0.5
        left = -1 if window_size_left is None or window_size_left >= keys else window_size_left
        right = -1 if window_size_right is None or window_size_right >= keys else window_size_right
        if rows == 1 and alibi_slopes is None:
            causal = False
        if causal:
            right = 0
        causal = left < 0 and right == 0
        local = left >= 0 and right >= 0
        assert not (causal or local) or rows <= 128 or rows % 128 == 0, "FlagGems would leave out keys"
        if not causal and not local:
            left = right = -1
        outs, lses = [], []
        for b in range(q.shape[0]):
            slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            out, lse = one(q[b], k[b], v[b], scale, softcap, left, right, slopes, causal)
            outs.append(out)
            lses.append(lse)
        return torch.stack(outs).to(q.dtype), torch.stack(lses), None, None, None

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, max_q: int, cu_q: Tensor, max_k: int, cu_k: Any = None, *,
        seqused_k: Any = None, softmax_scale: Any = None, causal: bool = False, window_size: Any = None,
        softcap: float = 0.0, alibi_slopes: Any = None, block_table: Any = None, return_softmax_lse: bool = False,
        out: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self.calls.append("varlen" if block_table is None else "paged")
        assert max_q > 1, "FlagGems would reorder the log-sum-exp"
        assert return_softmax_lse and cu_q.dtype == torch.int32 and k.stride() == v.stride()
        assert (cu_k is None) == (seqused_k is not None) == (block_table is not None)
        left, right = window_size or (-1, -1)
        if causal:
            right = 0
        left = -1 if left >= max_k else left
        right = -1 if right >= max_k else right
        if left >= 0:
            right = max(right, -1) if right >= 0 else -(10**6)  # a row would see no key right of diagonal - 1
        elif not causal:
            right = -1
        lse = torch.full((q.shape[1], q.shape[0]), float("nan"))
        for i in range(len(cu_q) - 1):
            rows = slice(int(cu_q[i]), int(cu_q[i + 1]))
            if block_table is None:
                assert cu_k.dtype == torch.int32
                keys, values = k[cu_k[i] : cu_k[i + 1]], v[cu_k[i] : cu_k[i + 1]]
            else:
                assert k.shape[1] == 1 and block_table.dtype == seqused_k.dtype == torch.int32
                pages = block_table[i, : seqused_k[i]].long()
                keys, values = k[pages, 0], v[pages, 0]
            slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
            part, lse[:, rows] = one(q[rows], keys, values, softmax_scale, softcap, left, right, slopes, causal)
            out[rows] = part.to(q.dtype)
        return out, lse


@pytest.fixture
def double(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Double:
    """The registered provider on top of the double, serving fp32 CPU tensors."""
    found = Double()
    module(monkeypatch, found)
    monkeypatch.setattr(flaggems, "accelerator_type", lambda: "cpu")
    provider = FlagGemsProvider()
    monkeypatch.setattr(FlagGemsProvider, "dtypes", frozenset({torch.float32}))
    monkeypatch.setitem(PROVIDERS, "flaggems", provider)
    dispatch.clear_cache()
    yield found
    dispatch.clear_cache()


def draw(batch: int, rows: int, keys: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, rows, heads, 32)
    k, v = torch.randn(2, batch, keys, kv_heads, 32)
    return q, k, v


def compare(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, lse_too: bool = True, **options: Any) -> None:
    options = {"softmax_scale": 32**-0.5, **options}
    inputs = AttentionInputs(q, k, v, mask=mask, needs_lse=True, **options)
    assert PROVIDERS["flaggems"].not_supported_reasons(inputs.signature()._replace(needs_lse=lse_too)) == []
    got = PROVIDERS["flaggems"].forward(inputs)
    want = PROVIDERS["reference"].forward(
        AttentionInputs(q.double(), k.double(), v.double(), mask=mask, needs_lse=True, **options)
    )
    assert got.out.is_contiguous() and got.out.dtype == q.dtype
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=1e-5)
    if lse_too:
        assert got.softmax_lse.is_contiguous()
        torch.testing.assert_close(got.softmax_lse, want.softmax_lse, atol=1e-5, rtol=1e-5)
    else:
        assert got.softmax_lse.isnan().all()


@pytest.mark.parametrize(
    "rows,keys", [(1, 40), (5, 40), (40, 5), (128, 130), (129, 129), (140, 150), (150, 140), (256, 256)]
)
@pytest.mark.parametrize("window", [(-1, -1), (7, 0), (7, 3), (7, -1), (-1, 7), (500, 3), (3, 500), (-1, 0), (0, 0)])
@pytest.mark.parametrize("causal", [True, False])
def test_flags(double: Double, rows: int, keys: int, window: tuple[int, int], causal: bool) -> None:
    compare(*draw(2, rows, keys), AttentionMask(causal=causal, window=window))
    assert double.calls in (["dense"], ["varlen"])


def test_the_faster_entry_point_where_it_is_right(double: Double) -> None:
    for rows, causal in ((129, False), (256, True), (100, True)):
        compare(*draw(1, rows, rows), AttentionMask(causal=causal))
    assert double.calls == ["dense"] * 3


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
@pytest.mark.parametrize("rows", [60, 129])
def test_scale_and_softcap(double: Double, scale: float, rows: int) -> None:
    for softcap in (0.0, 5.0):
        mask = AttentionMask(causal=True)
        compare(*draw(2, rows, rows), mask, softmax_scale=scale, softcap=softcap)


@pytest.mark.parametrize("rows,keys", [(60, 60), (129, 129), (1, 33), (20, 50)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_batch", [True, False])
def test_alibi(double: Double, rows: int, keys: int, causal: bool, per_batch: bool) -> None:
    slopes = torch.rand(2, 4) if per_batch else torch.rand(4)
    compare(*draw(2, rows, keys), AttentionMask(causal=causal), lse_too=not causal, alibi_slopes=slopes)


def test_strides(double: Double) -> None:
    q, k, v = draw(2, 40, 40)
    by_head = v.transpose(1, 2).contiguous().transpose(1, 2)
    compare(q, k, by_head, AttentionMask())
    wide = torch.randn(2, 40, 4 * 32 + 8)[..., :128].unflatten(-1, (4, 32))
    compare(wide, wide, wide, AttentionMask(causal=True))


def test_empty(double: Double) -> None:
    for rows, keys in ((0, 5), (5, 0)):
        compare(*draw(2, rows, keys), AttentionMask(causal=True))
    assert double.calls == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (7, -1), (-1, 7), (7, 7)])
@pytest.mark.parametrize("lengths", [([5, 40, 9], [5, 40, 9]), ([1, 1, 1], [9, 3, 30]), ([3, 0, 8], [6, 2, 0])])
def test_packed(double: Double, lengths: tuple[list[int], list[int]], window: tuple[int, int], causal: bool) -> None:
    """Two rows more than the sequences have belong to nobody: output 0, log-sum-exp -inf."""
    q, k, v = draw(1, sum(lengths[0]) + 2, sum(lengths[1]) + 2)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in lengths)
    mask = varlen_mask(cu_q, cu_k, q.shape[1], causal=causal, window=window)
    packed = PackedSequences(cu_q, cu_k, max(lengths[0]), max(lengths[1]), causal, window)
    compare(q, k, v, AttentionMask(row_intervals=mask.row_intervals, packed=packed))
    assert double.calls == ["varlen"]
    compare(q, k, v, AttentionMask(row_intervals=mask.row_intervals))
    assert double.calls == ["varlen", "paged"]


@pytest.mark.parametrize("flags", [{}, {"causal": True}, {"window": (9, 2)}], ids=str)
@pytest.mark.parametrize("part", ["intervals", "holes", "both"])
@pytest.mark.parametrize("shared", [True, False])
def test_row_intervals_and_key_masks(
    double: Double, part: str, shared: bool, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flaggems, "MAX_TABLE", 40 * 30)  # several calls
    q, k, v = draw(3, 21, 40)
    batch = 1 if shared else 3
    start = torch.randint(-2, 30, (batch, 21))
    intervals = torch.stack((start, start + torch.randint(-3, 60, start.shape)), dim=-1).int()
    holes = torch.rand(batch, 40) > 0.4
    mask = AttentionMask(
        row_intervals=None if part == "holes" else intervals, key_mask=None if part == "intervals" else holes, **flags
    )
    compare(q, k, v, mask)
    assert set(double.calls) == {"paged"} and len(double.calls) > 1


def test_refuses_what_the_signature_cannot_say(double: Double) -> None:
    q = torch.empty(1, 1, 1, 32)
    positions = AttentionMask(row_positions=torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(NotImplementedError, match="ALiBi"):
        PROVIDERS["flaggems"].forward(AttentionInputs(q, q, q, 1.0, positions, alibi_slopes=torch.ones(1)))
    large = torch.empty(1, 2**26, 1, 32, device="meta")
    with pytest.raises(NotImplementedError, match="32 bits"):
        PROVIDERS["flaggems"].forward(AttentionInputs(large, large, large, 1.0))


def test_through_the_library_op(double: Double) -> None:
    import hf_flash_plus

    q, k, v = draw(2, 40, 40)
    with hf_flash_plus.use_provider("flaggems"):
        out, lse, _ = hf_flash_plus.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        cu = torch.tensor([0, 15, 40], dtype=torch.int32)
        packed = hf_flash_plus.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 25, 25, causal=True)
    want, want_lse, _ = hf_flash_plus.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    want = hf_flash_plus.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 25, 25, causal=True)
    torch.testing.assert_close(packed, want)
    assert len(double.calls) >= 2
