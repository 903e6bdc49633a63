"""One model type into one row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from .. import dispatch
from . import multimodal
from .cells import CHECKS, DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from .checks import FUNCTIONS, generates
from .device import answers
from .find import brief, find_subject
from .inputs import parameters_of
from .memory import MEMORY, out_of_memory
from .subject import NAME, Settings, Subject


@dataclass
class Row:
    """What is known of one model type.

    Attributes:
        kind: the group it is listed under.
        runs: whether it runs in eager mode at all; ``reason`` says why not.
        how: which tiny configuration ran.
        calls: how many attention calls ``flash_plus`` served in all checks.
        providers: on accelerators, which providers served them.
        keeps: per class that keeps its own attention the reason.
        cells: per check its outcome; checks that do not apply are absent.
        unseen: checks that were not done, because the device stopped working for the process before them.
    """

    model_type: str
    kind: str = "other"
    cls: str = ""
    runs: bool = False
    reason: str = ""
    how: str = ""
    enlarged: bool = True
    calls: int = 0
    providers: list[str] = field(default_factory=list)
    keeps: dict[str, str] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether the whole model keeps its own attention."""
        return bool(self.keeps) and not self.calls

    def outcome(self) -> str:
        """The row in a word: the worst of its cells."""
        outcomes = {cell.outcome for cell in self.cells.values()}
        if not self.runs:
            return NOT_RUNNABLE
        return next((word for word in (DIFFERENT, REFUSED, EXACT) if word in outcomes), NOT_RUNNABLE)

    def completed(self, rest: Row) -> Row:
        """This row with the checks that it has not seen, from ``rest``, which another process did."""
        found = rest.cells
        if not rest.cls:  # nobody answered, or the model did not run this time: without a class, a row is run again
            cell = next(iter(rest.cells.values()), Cell(NOT_RUNNABLE, note=rest.reason))
            found = dict.fromkeys(self.unseen, cell)
        cells = self.cells | {name: cell for name, cell in found.items() if name in self.unseen}
        return replace(
            self,
            cls=rest.cls,
            cells={name: cells[name] for name in CHECKS if name in cells},
            unseen=rest.unseen,
            calls=self.calls + rest.calls,
            providers=sorted({*self.providers, *rest.providers}),
        )

    def short_of_memory(self) -> bool:
        """Whether something could not be seen for want of GPU memory."""
        return MEMORY in self.reason or any(MEMORY in cell.note for cell in self.cells.values())

    def as_json(self) -> dict[str, Any]:
        """The row as plain data; what is empty is left out."""
        data: dict[str, Any] = {"kind": self.kind, "runs": self.runs}
        if not self.runs:
            return {**data, "reason": self.reason}
        data |= {"class": self.cls, "config": self.how, "calls": self.calls}
        if not self.enlarged:
            data["weights"] = "fresh"
        if self.providers:
            data["providers"] = self.providers
        if self.keeps:
            data["keeps"] = self.keeps
        data["cells"] = {name: cell.as_json() for name, cell in self.cells.items()}
        return data

    @staticmethod
    def from_json(model_type: str, data: dict[str, Any]) -> Row:
        """The inverse of :meth:`as_json`."""
        return Row(
            model_type,
            kind=data["kind"],
            cls=data.get("class", ""),
            runs=data["runs"],
            reason=data.get("reason", ""),
            how=data.get("config", ""),
            enlarged=data.get("weights") != "fresh",
            calls=data.get("calls", 0),
            providers=data.get("providers", []),
            keeps=data.get("keeps", {}),
            cells={name: Cell.from_json(value) for name, value in data.get("cells", {}).items()},
        )


def kind_of(subject: Subject) -> str:
    """The group a model type is listed under."""
    model, names = subject.model("eager"), set(subject.inputs)
    parameters = parameters_of(model)
    pictures = any(name.startswith(("pixel_values", "flattened_patches")) for name in parameters)
    sounds = any(name in parameters for name in ("input_features", "input_values", "audio_values", "audio_features"))
    if "input_ids" in parameters and (pictures or sounds or subject.images or subject.images_error):
        return "multimodal"
    if pictures or any("grid" in name for name in names):
        return "multimodal" if "decoder_input_ids" in names else "vision"
    if sounds:
        return "audio"
    if "input_ids" not in names:
        return "other"
    if getattr(subject.config, "is_encoder_decoder", False) or "decoder_input_ids" in names:
        return "encoder-decoder"
    return "text decoder" if generates(subject) or "past_key_values" in parameters else "text encoder"


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the attention calls that ``flash_plus`` serves."""
    from .. import ops

    count, original = [0], ops.attention

    def attention(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    ops.attention = attention
    try:
        yield count
    finally:
        ops.attention = original


def run_row(model_type: str, checks: Sequence[str], settings: Settings) -> Row:
    """Find a way to run a model type and do the checks on it."""
    row = Row(model_type)
    dispatch.clear_cache()
    subject = find_subject(model_type, settings)
    if isinstance(subject, str):
        row.reason = subject
        return row
    row.runs, row.cls, row.how, row.enlarged = True, subject.cls.__name__, subject.how, subject.enlarged
    eager = subject.model("eager")
    if multimodal.takes_images_or_audio(eager):
        try:
            # On a copy: some models remember positions from one forward to the next.
            subject.images = multimodal.build(copy.deepcopy(eager).to("cpu"), model_type)
        except Exception as problem:
            subject.images_error = f"no rule makes its images: {brief(problem)}"
    row.kind = kind_of(subject)
    try:
        row.keeps = _kept(subject.model(NAME, settings.dtype))
    except ValueError as problem:
        row.keeps = {row.cls: f"the model itself refuses to be loaded with it: {brief(problem)}"}
        row.cells["forward"] = Cell(REFUSED, note=next(iter(row.keeps.values())))
        return row
    except Exception as problem:
        outcome = NOT_RUNNABLE if out_of_memory(problem) else DIFFERENT
        row.cells["forward"] = Cell(outcome, note=f"flash_plus cannot be loaded: {brief(problem)}")
        return row
    with _counted() as count:
        for name in (name for name in CHECKS if name in checks):
            if row.keeps and not count[0] and row.cells:
                break  # its own attention stays: there is nothing to compare
            cell = _checked(name, subject, row.kind)
            if cell is not None:
                row.cells[name] = cell
            if not answers(settings.device):
                row.unseen = [later for later in list(CHECKS)[list(CHECKS).index(name) + 1 :] if later in checks]
                break
    row.calls = count[0]
    if settings.device != "cpu":
        row.providers = dispatch.providers_used()
    if row.refused:
        note = "; ".join(f"{cls} keeps its own attention: {reason}" for cls, reason in row.keeps.items())
        note = note if len(row.keeps) == 1 else "every part keeps its own attention (see keeps)"
        row.cells = {name: _refused(cell, note) for name, cell in row.cells.items()}
    return row


def _checked(name: str, subject: Subject, kind: str) -> Cell | None:
    try:
        return FUNCTIONS[name](subject, kind)
    except Exception as problem:
        outcome = NOT_RUNNABLE if out_of_memory(problem) else DIFFERENT
        return Cell(outcome, note=f"the check fails: {brief(problem)}")


def _refused(cell: Cell, note: str) -> Cell:
    return Cell(REFUSED, note=note) if cell.outcome in (EXACT, DIFFERENT) else cell


def _kept(model: Any) -> dict[str, str]:
    """The models inside a model that keep their own attention, and why."""
    from ..integration.models import unsupported_reason
    from ..integration.patch import _models

    kept = {}
    for _, part in _models(model):
        if part.config._attn_implementation != NAME:
            reason = unsupported_reason(part)
            if reason is not None:
                kept[type(part).__name__] = reason
    return dict(sorted(kept.items()))
