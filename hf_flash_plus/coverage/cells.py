"""What a cell of the coverage table can say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXACT, REFUSED, NOT_RUNNABLE, DIFFERENT = "exact", "refused", "not runnable", "DIFFERENT"

#: The checks, in the order of the columns, and what each compares with eager.
CHECKS: dict[str, str] = {
    "forward": "forward without a mask",
    "left": "left padding, at real positions",
    "right": "right padding, at real positions",
    "inner": "padding inside a row, at real positions",
    "gradients": "gradients of all parameters (with left padding where that runs)",
    "packed": "documents packed into one row, told apart by position_ids",
    "generate": "greedy generation with a dynamic cache, left-padded",
    "static": "greedy generation with a static cache, left-padded",
    "images": "images or audio in the prompt, without and with left padding",
    "patch": "patch_model gives the same as loading with flash_plus, unpatch_model takes it back, both to the bit",
}


@dataclass(frozen=True)
class Cell:
    """The outcome of one check of one model type.

    Attributes:
        error: the largest difference, relative to the largest expected value.
        note: why it was refused or does not run, or what else a reader should know.
        eager: in low precision, eager's own error in that precision.
    """

    outcome: str
    error: float | None = None
    note: str = ""
    eager: float | None = None

    def as_json(self) -> Any:
        """A bare word where there is nothing more to say."""
        if self.error is None and not self.note:
            return self.outcome
        result: dict[str, Any] = {"outcome": self.outcome}
        if self.error is not None:
            result["error"] = float(f"{self.error:.1e}")
        if self.eager is not None:
            result["eager"] = float(f"{self.eager:.1e}")
        if self.note:
            result["note"] = self.note
        return result

    @staticmethod
    def from_json(value: Any) -> Cell:
        """The inverse of :meth:`as_json`."""
        if isinstance(value, str):
            return Cell(value)
        return Cell(value["outcome"], value.get("error"), value.get("note", ""), value.get("eager"))
