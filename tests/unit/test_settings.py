"""The environment variables: parsing, errors, and that they are read when a call is made."""

from __future__ import annotations

import threading

import pytest

from hf_flash_plus import settings

TRUE = ["TRUE", "true", "True", "tRuE", "1", "on", "ON", "On", "yes", "YES", " true ", "1\n"]
FALSE = ["FALSE", "false", "False", "fAlSe", "0", "off", "OFF", "Off", "no", "NO", " false ", "0\n"]
BAD = ["2", "-1", "y", "n", "t", "f", "enabled", "TRUE FALSE", "flaggems", "None", "01", "ture"]

BOOLEANS = [
    (settings.USE_FLAGGEMS, settings.use_flaggems, True),
    (settings.DETERMINISTIC, settings.deterministic, False),
]


@pytest.mark.parametrize(("name", "read", "default"), BOOLEANS, ids=[b[0] for b in BOOLEANS])
class TestBooleans:
    def test_default(self, name, read, default, monkeypatch):
        monkeypatch.delenv(name, raising=False)
        assert read() is default
        monkeypatch.setenv(name, "")
        assert read() is default, "an empty variable is an unset one"

    @pytest.mark.parametrize("text", TRUE, ids=repr)
    def test_true(self, name, read, default, text, monkeypatch):
        monkeypatch.setenv(name, text)
        assert read() is True

    @pytest.mark.parametrize("text", FALSE, ids=repr)
    def test_false(self, name, read, default, text, monkeypatch):
        monkeypatch.setenv(name, text)
        assert read() is False

    @pytest.mark.parametrize("text", BAD, ids=repr)
    def test_invalid(self, name, read, default, text, monkeypatch):
        monkeypatch.setenv(name, text)
        for _ in range(2):  # a remembered result must not hide the error the second time
            with pytest.raises(ValueError) as caught:
                read()
            message = str(caught.value)
            assert name in message and repr(text) in message
            assert all(word in message for word in ("TRUE", "1", "ON", "YES", "FALSE", "0", "OFF", "NO"))

    def test_read_at_call_time(self, name, read, default, monkeypatch):
        for text, value in (("TRUE", True), ("0", False), ("on", True), ("off", False)):
            monkeypatch.setenv(name, text)
            assert read() is value
        monkeypatch.delenv(name)
        assert read() is default


def test_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.KERNELS, raising=False)
    assert settings.portable_kernels() is False
    for text, value in (("portable", True), (" Portable ", True), ("auto", False), ("", False)):
        monkeypatch.setenv(settings.KERNELS, text)
        assert settings.portable_kernels() is value
    monkeypatch.setenv(settings.KERNELS, "hopper")
    with pytest.raises(ValueError, match=r"HF_FLASH_PLUS_KERNELS='hopper'.*auto, portable"):
        settings.portable_kernels()


def test_forced_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.PROVIDER, raising=False)
    assert settings.forced_provider() is None
    for text, value in (("reference", "reference"), (" Torch_SDPA ", "torch_sdpa"), ("", None), ("  ", None)):
        monkeypatch.setenv(settings.PROVIDER, text)
        assert settings.forced_provider() == value


def test_override_wins_over_the_variable_and_nests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.PROVIDER, "torch_sdpa")
    with settings.provider_override("reference"):
        assert settings.forced_provider() == "reference"
        with settings.provider_override("triton"):
            assert settings.forced_provider() == "triton"
        assert settings.forced_provider() == "reference"
    assert settings.forced_provider() == "torch_sdpa"


def test_override_ends_with_an_exception() -> None:
    with pytest.raises(RuntimeError), settings.provider_override("reference"):
        raise RuntimeError
    assert settings.forced_provider() is None


def test_override_is_of_this_thread_only() -> None:
    seen: list[str | None] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(5)
        seen.append(settings.forced_provider())
        with settings.provider_override("torch_sdpa"):
            seen.append(settings.forced_provider())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with settings.provider_override("reference"):
        inside.set()
        assert done.wait(5)
        assert settings.forced_provider() == "reference"
    thread.join()
    assert seen == [None, "torch_sdpa"]


def test_table_documents_every_variable() -> None:
    names = {settings.USE_FLAGGEMS, settings.PROVIDER, settings.DETERMINISTIC, settings.KERNELS}
    assert {s.name for s in settings.SETTINGS} == names
    assert all(s.values and s.meaning for s in settings.SETTINGS)
