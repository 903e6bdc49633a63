"""Who serves a call: order, reasons, errors, the cache, forcing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, NoProviderError, dispatch, settings, use_provider
from hf_flash_plus.inputs import DTYPES, AttentionInputs, CallSignature
from hf_flash_plus.providers import ALL_FEATURES, PROVIDERS, AttentionOutput, Provider
from hf_flash_plus.providers.base import FEATURES

from .toy import registered


class Recorder(Provider):
    """A provider that serves everything but what it is told not to, and remembers what it was asked."""

    differentiable = True
    dtypes = frozenset(DTYPES)
    features = ALL_FEATURES
    summary = "for tests"

    def __init__(self, name: str, reasons: tuple[str, ...] = (), auto: tuple[str, ...] = ()) -> None:
        self.name = name  # type: ignore[misc]
        self.reasons, self.auto, self.asked, self.served = reasons, auto, 0, 0

    def not_supported_reasons(self, signature: CallSignature) -> list[str]:
        self.asked += 1
        return [*super().not_supported_reasons(signature), *self.reasons]

    def auto_reasons(self, signature: CallSignature) -> list[str]:
        return list(self.auto)

    def forward(self, inputs: AttentionInputs) -> AttentionOutput:
        self.served += 1
        return PROVIDERS["reference"].forward(inputs)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (settings.USE_FLAGGEMS, settings.PROVIDER, settings.DETERMINISTIC):
        monkeypatch.delenv(name, raising=False)
    dispatch.clear_cache()
    yield
    dispatch.clear_cache()


def paths(monkeypatch: pytest.MonkeyPatch, on: tuple[str, ...], off: tuple[str, ...] = ("reference",)) -> None:
    monkeypatch.setattr(dispatch, "PATHS", {True: on, False: off})


def call(**kwargs: Any) -> Any:
    q = torch.randn(1, 4, 2, 8)
    return hfp.flash_attn_func(q, q, q, **kwargs)


def signature(q: torch.Tensor | None = None, **kwargs: Any) -> CallSignature:
    q = torch.randn(1, 4, 2, 8) if q is None else q
    return AttentionInputs(q, q, q, 1.0, **kwargs).signature()


def test_paths_are_the_documented_ones() -> None:
    assert dispatch.PATHS == {
        True: ("flaggems", "triton", "torch_sdpa", "reference"),
        False: ("flash_attn", "torch_sdpa", "reference"),
    }
    # Providers of a path that are not registered (yet) are no error.
    assert [p.name for p in dispatch.path_providers(False)] == ["flash_attn", "torch_sdpa", "reference"]


def test_reference_is_last_everywhere_and_torch_sdpa_serves_the_cpu() -> None:
    for path in (True, False):
        assert dispatch.PATHS[path][-1] == "reference"
        assert dispatch._select(signature(), path, None).provider.name == "torch_sdpa"
        assert dispatch._select(signature(softcap=1.0), path, None).provider.name == "reference"


def test_first_that_can_serves_and_every_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c, d = Recorder("a", ("too red", "too round")), Recorder("b", auto=("slower",)), Recorder("c"), Recorder("d")
    with registered(a, b, c, d):
        paths(monkeypatch, ("a", "b", "c", "d"))
        selection = dispatch.select_provider(signature())
        assert selection.provider is c
        assert selection.rejected == (("a", ("too red", "too round")), ("b", ("slower",)))
        assert d.asked == 0
        assert b.asked == 0, "a provider that steps aside is not asked whether it could"
        call()
        assert (a.served, b.served, c.served, d.served) == (0, 0, 1, 0)


def test_switching_the_path_takes_effect_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    on, off = Recorder("on"), Recorder("off")
    with registered(on, off):
        paths(monkeypatch, ("on",), ("off",))
        for value, count in (("TRUE", (1, 0)), ("FALSE", (1, 1)), ("off", (1, 2)), ("1", (2, 2))):
            monkeypatch.setenv(settings.USE_FLAGGEMS, value)
            call()
            assert (on.served, off.served) == count
        monkeypatch.delenv(settings.USE_FLAGGEMS)
        call()
        assert (on.served, off.served) == (3, 2), "TRUE is the default"


def test_an_invalid_setting_is_an_error_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    call()
    monkeypatch.setenv(settings.USE_FLAGGEMS, "maybe")
    with pytest.raises(ValueError, match=r"FLASH_ATTENTION_USE_FLAGGEMS='maybe'.*TRUE.*FALSE"):
        call()
    monkeypatch.setenv(settings.USE_FLAGGEMS, "TRUE")
    call()


@pytest.mark.parametrize("how", ["variable", "context"])
def test_a_forced_provider_serves_or_raises(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, wanted, unable = Recorder("first"), Recorder("wanted", auto=("slower",)), Recorder("unable", ("too red",))
    with registered(first, wanted, unable):
        paths(monkeypatch, ("first",))

        def forced(name: str) -> None:
            if how == "variable":
                monkeypatch.setenv(settings.PROVIDER, name)
                call()
            else:
                with use_provider(name):
                    call()

        forced("wanted")
        assert (first.served, wanted.served) == (0, 1), "stepping aside is for automatic selection only"
        with pytest.raises(NoProviderError, match="'unable' is forced") as caught:
            forced("unable")
        assert "unable: too red" in str(caught.value)
        assert (first.served, wanted.served, unable.served) == (0, 1, 0), "never another provider silently"


def test_forced_by_variable_in_any_case_and_read_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Recorder("toy")
    with registered(toy):
        call()
        assert toy.served == 0
        monkeypatch.setenv(settings.PROVIDER, "TOY")
        call()
        assert toy.served == 1
        monkeypatch.setenv(settings.PROVIDER, "")
        call()
        assert toy.served == 1


def test_unknown_provider_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown provider 'cudnn'") as caught, use_provider("cudnn"):
        pass
    assert all(name in str(caught.value) for name in PROVIDERS)
    monkeypatch.setenv(settings.PROVIDER, "cudnn")
    with pytest.raises(ValueError, match="unknown provider 'cudnn'") as caught:
        call()
    assert all(name in str(caught.value) for name in (settings.PROVIDER, *PROVIDERS))


def test_use_provider_is_of_this_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    toy, usual = Recorder("toy"), Recorder("usual")
    with registered(toy, usual):
        paths(monkeypatch, ("usual",))
        with use_provider("toy"):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            assert (toy.served, usual.served) == (0, 1)
            call()
            assert (toy.served, usual.served) == (1, 1)
        call()
        assert (toy.served, usual.served) == (1, 2)


def test_no_provider_error_lists_the_call_and_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(
        Recorder("a", ("too red", "too round")), Recorder("b", ("too late",)), Recorder("c", auto=("shy",))
    ):
        paths(monkeypatch, ("a", "b", "c"))
        q = torch.randn(2, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
        k = torch.randn(2, 3, 2, 16, dtype=torch.bfloat16)
        with pytest.raises(NotImplementedError) as caught:
            hfp.flash_attn_func(q, k, k, causal=True, window_size=(5, -1), softcap=2.0)
    assert isinstance(caught.value, NoProviderError)
    message = str(caught.value)
    for part in ("a: too red", "a: too round", "b: too late", "c: shy", "FLASH_ATTENTION_USE_FLAGGEMS=TRUE"):
        assert part in message, message
    for part in ("cpu", "bfloat16", "head_dim 16", "heads 4/2", "causal", "window", "softcap", "needs_grad"):
        assert part in message, message
    assert "hf-flash-plus explain" in message


def test_selection_is_cached_by_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Recorder("a", ("no",)), Recorder("b")
    with registered(a, b):
        paths(monkeypatch, ("a", "b"))
        for length in (5, 9, 5, 16):  # lengths are not part of the signature
            q = torch.randn(3, length, 2, 8)
            hfp.flash_attn_func(q, q, q)
        assert (a.asked, b.asked) == (1, 1)
        assert b.served == 4
        q = torch.randn(3, 17, 2, 8)  # more queries than a short query has
        hfp.flash_attn_func(q, q, q)
        assert (a.asked, b.asked) == (2, 2)
        call(causal=True)
        assert (a.asked, b.asked) == (3, 3)
        call(causal=True)
        monkeypatch.setenv(settings.USE_FLAGGEMS, "true")  # the same setting in other words
        call(causal=True)
        assert (a.asked, b.asked) == (3, 3)
        dispatch.clear_cache()
        call(causal=True)
        assert (a.asked, b.asked) == (4, 4)


def test_errors_are_not_remembered_as_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    a = Recorder("a", ("no",))
    with registered(a):
        paths(monkeypatch, ("a",))
        with pytest.raises(NoProviderError):
            call()
        a.reasons = ()
        call()
        assert a.served == 1


SIGNATURE_FIELDS: dict[str, tuple[dict[str, Any], Any]] = {
    "causal": ({"mask": AttentionMask(causal=True)}, True),
    "window": ({"mask": AttentionMask(window=(2, -1))}, True),
    "intervals": ({"mask": AttentionMask(row_intervals=torch.zeros(1, 4, 2, dtype=torch.int32))}, True),
    "key_mask": ({"mask": AttentionMask(key_mask=torch.ones(1, 4, dtype=torch.bool))}, True),
    "bias": ({"mask": AttentionMask(bias=torch.ones(1, 1, 4, 4, dtype=torch.bool))}, "bool"),
    "bias_grad": ({"mask": AttentionMask(bias=torch.ones(1, 1, 4, 4, requires_grad=True))}, True),
    "needs_grad": ({"sinks": torch.ones(2, requires_grad=True)}, True),
    "alibi": ({"alibi_slopes": torch.ones(2)}, True),
    "sinks": ({"sinks": torch.ones(1, 2, 4)}, "row"),
    "softcap": ({"softcap": 2.0}, True),
    "dropout": ({"dropout_p": 0.1}, True),
    "needs_lse": ({"needs_lse": True}, True),
    "deterministic": ({"deterministic": True}, True),
}


@pytest.mark.parametrize("field", SIGNATURE_FIELDS)
def test_signature_tells_features_apart(field: str) -> None:
    kwargs, value = SIGNATURE_FIELDS[field]
    assert getattr(signature(**kwargs), field) == value
    assert signature(**kwargs) != signature()
    assert hash(signature(**kwargs)) == hash(signature(**kwargs))


def test_signature_knows_whether_gradients_are_wanted() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    assert signature(q).needs_grad
    with torch.no_grad():
        assert not signature(q).needs_grad
    with torch.inference_mode():
        assert not signature(q).needs_grad


class Half(Recorder):
    device_types = frozenset({"cuda"})
    dtypes = frozenset({torch.float16})
    max_head_dim = 64
    head_dim_multiple = 8
    features = frozenset({"window"})


def test_capability_data_becomes_reasons_all_of_them() -> None:
    q, kv = torch.randn(1, 4, 2, 100, requires_grad=True), torch.randn(1, 4, 1, 100)
    inputs = AttentionInputs(q, kv, kv, 1.0, AttentionMask(causal=True, window=(1, -1)), softcap=1.0, dropout_p=0.5)
    reasons = Half("half").not_supported_reasons(inputs.signature())
    assert reasons == [
        "serves tensors on cuda, these are on cpu",
        "serves float16, these are float32",
        "serves head dimensions up to 64, this is 100",
        "serves head dimensions that are a multiple of 8, these are 100 and 100",
        "does not serve softcap",
        "does not serve dropout",
        "does not serve fewer key than query heads (GQA, MQA)",
        "does not serve gradients",
    ]


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_every_feature_can_be_refused(feature: str) -> None:
    class Without(Recorder):
        features = ALL_FEATURES - {feature}

    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    base = signature(q)._replace(needs_grad=False)
    wants = {
        "window": {"window": True},
        "packed": {"packed": True, "intervals": True},
        "intervals": {"intervals": True},
        "key_mask": {"key_mask": True},
        "bool_bias": {"bias": "bool"},
        "float_bias": {"bias": "float"},
        "bias_grad": {"bias": "float", "bias_grad": True},
        "alibi": {"alibi": True},
        "sinks": {"sinks": "head"},
        "row_sinks": {"sinks": "row"},
        "softcap": {"softcap": True},
        "dropout": {"dropout": True},
        "gqa": {"nheads_k": 1},
        "v_head_dim": {"v_head_dim": 16},
        "lse": {"needs_lse": True},
        "grad": {"needs_grad": True},
        "deterministic": {"deterministic": True, "needs_grad": True},
    }
    provider = Without("without")
    assert provider.not_supported_reasons(base) == []
    assert provider.not_supported_reasons(base._replace(**wants[feature])) == [f"does not serve {FEATURES[feature][1]}"]


def test_an_unavailable_provider_says_only_that() -> None:
    class Gone(Half):
        def unavailable_reason(self) -> str | None:
            return "not installed"

    assert Gone("gone").not_supported_reasons(signature()) == ["not installed"]


def test_explain_shows_every_provider_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 2, 8)
    with registered(Recorder("a", ("too red",)), Recorder("b", auto=("slower",)), Recorder("c")):
        paths(monkeypatch, ("a", "b", "c", "reference"))
        verdicts = hfp.explain(AttentionInputs(q, q, q, 1.0))
        assert [v.provider for v in verdicts][:4] == ["a", "b", "c", "reference"]
        assert {v.provider for v in verdicts} == set(PROVIDERS)
        assert [v.chosen for v in verdicts][:4] == [False, False, True, False]
        assert sum(v.chosen for v in verdicts) == 1
        assert verdicts[0].reasons == ("too red",) and verdicts[1].steps_aside == ("slower",)
        with use_provider("b"):
            forced = {v.provider: v for v in hfp.explain(AttentionInputs(q, q, q, 1.0))}
        assert forced["b"].chosen and forced["b"].steps_aside == ()
        paths(monkeypatch, ("a",))
        dispatch.clear_cache()
        assert not any(v.chosen for v in hfp.explain(AttentionInputs(q, q, q, 1.0))), "explaining raises nothing"


def test_the_deterministic_variable_reaches_the_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sloppy(Recorder):
        features = ALL_FEATURES - {"deterministic"}

    sloppy, careful = Sloppy("sloppy"), Recorder("careful")
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with registered(sloppy, careful):
        paths(monkeypatch, ("sloppy", "careful"))
        hfp.flash_attn_func(q, q, q)
        hfp.flash_attn_func(q, q, q, deterministic=True)
        assert (sloppy.served, careful.served) == (1, 1)
        monkeypatch.setenv(settings.DETERMINISTIC, "1")
        hfp.flash_attn_func(q, q, q)
        assert (sloppy.served, careful.served) == (1, 2)
        hfp.flash_attn_func(q.detach(), q.detach(), q.detach())
        assert (sloppy.served, careful.served) == (2, 2), "without gradients there is nothing to be deterministic about"
