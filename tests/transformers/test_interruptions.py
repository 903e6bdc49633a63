"""Ctrl-C wherever it may come: a model is patched or it is not, and Transformers knows our name or it does not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import transformers.modeling_flash_attention_utils as flash_utils
from torch import nn
from transformers import PreTrainedModel, masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_flash_plus import is_registered, patch_model, register, unpatch_model, unregister
from hf_flash_plus.integration import patch, registration

from .test_patch import snapshot
from .tiny import build


class Interrupting:
    """Raises KeyboardInterrupt before the n-th line that is run in some files, as a signal handler would."""

    def __init__(self, files: set[str], at: int) -> None:
        self.files, self.at, self.lines = files, at, 0

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._line if frame.f_code.co_filename in self.files else None

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)  # once: what cleans up is not interrupted a second time
                raise KeyboardInterrupt
        return self._line


def every_interruption(module: Any, call: Callable[[], object], check: Callable[[int], None]) -> int:
    """Call with an interruption at each line in turn, until one comes through whole; how many were interrupted."""
    for at in range(1, 2000):
        try:
            with Interrupting({module.__file__}, at):
                call()
        except KeyboardInterrupt:
            check(at)
        else:
            return at - 1
    raise AssertionError("does not end")


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])  # gpt_neo: classes of modules change, too
def test_patching_is_all_or_nothing(name: str) -> None:
    model = build(name)
    before = snapshot(model)

    def check(at: int) -> None:
        assert snapshot(model) == before, f"interrupted at line {at}"
        assert unpatch_model(model) is False

    interrupted = every_interruption(patch, lambda: patch_model(model), check)
    assert interrupted > 10
    assert model.config._attn_implementation == "flash_plus"
    assert unpatch_model(model) and snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_unpatching_can_be_taken_up_again(name: str) -> None:
    model = build(name)
    before = snapshot(model)

    def unpatch() -> None:
        patch_model(model)
        sys.settrace(tracer._call)
        unpatch_model(model)

    for at in range(1, 500):
        tracer = Interrupting({patch.__file__}, at)
        tracer.before = None
        try:
            unpatch()
        except KeyboardInterrupt:
            unpatch_model(model)
            assert snapshot(model) == before, f"interrupted at line {at}"
        else:
            break
        finally:
            sys.settrace(None)
    assert at > 5 and snapshot(model) == before


def transformers_state() -> dict[str, object]:
    return {
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "imports": flash_utils._lazy_imports,
        "check": vars(PreTrainedModel)["_check_and_adjust_attn_implementation"],
        "correct": vars(PreTrainedModel)["get_correct_attn_implementation"],
        "requested": masking_utils.is_flash_attention_requested,
    }


def test_registering_is_all_or_nothing() -> None:
    unregister()
    try:
        before = transformers_state()

        def check(at: int) -> None:
            assert transformers_state() == before and not is_registered(), f"interrupted at line {at}"

        assert every_interruption(registration, register, check) > 10
        assert is_registered() and "flash_plus" in AttentionInterface()
    finally:
        register()


def test_the_interruptions_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see a model left half patched."""
    monkeypatch.setattr(patch, "_restore", lambda changes: None)
    model: nn.Module = build("gpt_neo")
    before, seen = snapshot(model), []
    every_interruption(patch, lambda: patch_model(model), lambda _at: seen.append(snapshot(model) == before))
    assert not all(seen)
