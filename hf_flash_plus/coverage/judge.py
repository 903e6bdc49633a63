"""From an observation of two models to a cell: tolerance, eager's own noise, and fp64 as the arbiter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .cells import DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from .choices import SELECTIONS, WITH_THRESHOLDS, Choices
from .compare import Outputs, error, has_nan
from .device import answers, settle
from .exceptions import RAISES, reference
from .find import brief
from .memory import out_of_memory
from .subject import NAME, Subject, build

#: What one check looks at: from a model and the precision of its inputs to named tensors.
Observe = Callable[[Any, torch.dtype], Outputs]
#: In low precision flash_plus may be this many times as far from fp32 eager as eager is in the same precision,
LOW_PRECISION_FACTOR = 2.0
#: or this far (one rounding of the largest value to bf16).
LOW_PRECISION_FLOOR = 2.0**-8
#: What is smaller than this part of the largest output is measured as if it were that large.
LOW_FLOOR = 5e-2
#: Sets of weights a rounding away that both are measured with, where the weights themselves leave a doubt.
NEIGHBOURS = 8
_FP64_TOLERANCE = 1e-7
#: Half a unit in the last place of fp32.
_ROUNDING = 2.0**-24


def judge(
    subject: Subject, check: str, observe: Observe, keep: dict[str, Tensor] | None = None, floor: float = 0.0
) -> Cell:
    """Observe the reference and ``flash_plus`` and compare.

    Args:
        keep, floor: as in :func:`.compare.error`.
    """
    implementation, why = reference(subject.model_type, check)
    fp32 = torch.float32
    try:
        expected = observe(subject.model(implementation), fp32)
        settle(subject.settings.device)
    except Exception as problem:
        return Cell(NOT_RUNNABLE, note=f"{implementation} itself fails: {brief(problem)}")
    if not expected:
        return Cell(NOT_RUNNABLE, note="there is no output to compare")
    if implementation == "eager" and has_nan(expected):
        finite = _sdpa(subject, observe)
        if finite is not None:
            implementation, why, expected = "sdpa", "eager gives NaN, at rows that see no key", finite
        elif _only_nan(expected):
            return Cell(NOT_RUNNABLE, note="eager itself gives NaN")
    note = f"against {implementation}: {why}" if why else ""
    dtype = subject.settings.dtype
    try:
        actual = observe(subject.model(NAME, dtype), dtype)
        settle(subject.settings.device)
    except NotImplementedError as problem:
        return Cell(REFUSED, note=brief(problem))
    except Exception as problem:
        if out_of_memory(problem):
            note = f"{brief(problem)} (a process may take {subject.settings.memory_gib:g} GiB)"
            return Cell(NOT_RUNNABLE, note=note)
        if not answers(subject.settings.device):  # nobody else can be asked then, and it was not the reference
            return Cell(DIFFERENT, note=f"flash_plus loses the device: {brief(problem)}")
        fails = _low_precision_failure(subject, observe, implementation)
        if fails is not None:
            return Cell(NOT_RUNNABLE, note=fails)
        known = RAISES.get((subject.model_type, check))
        if known is not None:
            return Cell(REFUSED, note=f"{known}; flash_plus raises {brief(problem)}")
        refused = isinstance(problem, (ValueError, RuntimeError)) and NAME in str(problem)
        return Cell(REFUSED if refused else DIFFERENT, note=f"flash_plus raises {brief(problem)}")
    if dtype is not fp32:
        return _low_precision(subject, observe, expected, actual, keep, implementation)
    value = error(expected, actual, keep, floor)
    if value <= subject.settings.tolerance:
        return Cell(EXACT, value, note)
    return _explain(subject, observe, expected, value, keep, floor, implementation, note)


def _explain(
    subject: Subject,
    observe: Observe,
    expected: Outputs,
    value: float,
    keep: dict[str, Tensor] | None,
    floor: float,
    implementation: str,
    note: str,
) -> Cell:
    """Whether a difference is eager's own noise, or rounding that fp64 does not show."""
    noise = error(expected, observe(subject.model(implementation), torch.float32), keep, floor)
    if noise > 0 and value <= 2 * noise:
        return Cell(EXACT, value, f"{implementation} differs from itself by {noise:.1e} from run to run")
    try:
        double = [copy.deepcopy(subject.model(name)).double() for name in (implementation, NAME)]
        outputs = [observe(model, torch.float64) for model in double]
        in_double = error(outputs[0], outputs[1], keep, floor)
        verdict = f"in fp64 {in_double:.1e}"
    except Exception as problem:
        in_double, verdict = float("inf"), f"fp64 does not run: {brief(problem)}"
    if in_double <= min(_FP64_TOLERANCE, value / 100):
        return Cell(EXACT, in_double, _join(note, f"in fp64; in fp32 rounding grows to {value:.1e}"))
    if in_double <= min(subject.settings.tolerance, value / 5):
        return Cell(EXACT, in_double, _join(note, f"in fp64 with parts in fp32; in fp32 rounding grows to {value:.1e}"))
    swing = _swing(subject, observe, expected, keep, floor, implementation)
    if value <= swing:
        why = f"{implementation} itself moves by up to {swing:.1e} when its weights change by one rounding"
        return Cell(EXACT, value, _join(note, why))
    return Cell(DIFFERENT, value, _join(note, verdict, f"eager moves by {swing:.1e} when its weights change"))


def _swing(
    subject: Subject,
    observe: Observe,
    expected: Outputs,
    keep: dict[str, Tensor] | None,
    floor: float,
    implementation: str,
) -> float:
    """How far the reference's own result moves when every weight changes in its last digit (models that sample)."""
    model = copy.deepcopy(subject.model(implementation))
    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: value * (1 + _ROUNDING * torch.randn(value.shape, generator=generator))
            if value.is_floating_point()
            else value
            for name, value in subject.state.items()
        }
        model.load_state_dict(state)
        moved = error(expected, observe(model, torch.float32), keep, floor)
        worst = max(worst, moved if moved < float("inf") else 0.0)
    return worst


def _low_precision(
    subject: Subject,
    observe: Observe,
    expected: Outputs,
    actual: Outputs,
    keep: dict[str, Tensor] | None,
    implementation: str,
) -> Cell:
    """``flash_plus`` in low precision, bounded by what the reference's own low precision costs."""
    dtype = subject.settings.dtype
    try:
        low = observe(subject.model(implementation, dtype), dtype)
        settle(subject.settings.device)
    except Exception as problem:
        return Cell(NOT_RUNNABLE, note=_fails(implementation, dtype, problem))
    finally:
        subject.forget(implementation, dtype)
    allowed, value = error(expected, low, keep, floor=LOW_FLOOR), error(expected, actual, keep, floor=LOW_FLOOR)
    if value <= max(LOW_PRECISION_FACTOR * allowed, LOW_PRECISION_FLOOR):
        return Cell(EXACT, value, eager=allowed)
    mean_allowed, mean = mean_error(expected, low, keep), mean_error(expected, actual, keep)
    if mean <= max(LOW_PRECISION_FACTOR * mean_allowed, LOW_PRECISION_FLOOR / 4):
        return Cell(EXACT, value, "by root mean square error, not by the largest", allowed)
    same = _with_same_choices(subject, observe, keep, implementation)
    if same is not None:
        return same
    # Where the reference gives other infinities than in fp32, nothing can be said; where flash_plus does, it is wrong.
    draws = [draw for draw in _neighbours(subject, observe, keep, implementation) if draw[0] < float("inf")]
    theirs, ours = [draw[0] for draw in draws], [draw[1] for draw in draws]
    worst = max([allowed, *theirs])
    middle = (median(ours), median(theirs)) if draws else (float("inf"), 0.0)
    if value <= LOW_PRECISION_FACTOR * worst and middle[0] <= max(
        LOW_PRECISION_FACTOR * middle[1], LOW_PRECISION_FLOOR
    ):
        note = (
            f"over {len(draws)} sets of neighbouring weights {implementation}'s own error is up to {worst:.1e}, "
            f"{middle[1]:.1e} in the middle (flash_plus {middle[0]:.1e})"
        )
        return Cell(EXACT, value, note, allowed)
    note = (
        f"root mean square {mean:.1e}, {implementation}'s {mean_allowed:.1e}; over {len(draws)} sets of neighbouring "
        f"weights in the middle {middle[0]:.1e}, {implementation}'s {middle[1]:.1e} (at most {worst:.1e})"
    )
    return Cell(DIFFERENT, value, note, allowed)


def _with_same_choices(
    subject: Subject, observe: Observe, keep: dict[str, Tensor] | None, implementation: str
) -> Cell | None:
    """The comparison with the fp32 reference's choices of experts and keys put into both runs in low precision, by the
    same bound; None where there are no choices, or the runs do not make the same ones, or it is not within the bound.
    """
    for names in (SELECTIONS, WITH_THRESHOLDS):
        cell = _with_same(Choices(names), subject, observe, keep, implementation)
        if cell is not None:
            return cell
    return None


def _with_same(
    choices: Choices, subject: Subject, observe: Observe, keep: dict[str, Tensor] | None, implementation: str
) -> Cell | None:
    dtype = subject.settings.dtype
    with choices.recorded():
        expected = observe(subject.model(implementation, torch.float32), torch.float32)
    if not len(choices):
        return None
    outputs = []
    try:
        for name in (implementation, NAME):
            with choices.repeated():
                outputs.append(observe(subject.model(name, dtype), dtype))
    except LookupError:
        return None
    finally:
        subject.forget(implementation, dtype)
    allowed, value = (error(expected, found, keep, floor=LOW_FLOOR) for found in outputs)
    if value > max(LOW_PRECISION_FACTOR * allowed, LOW_PRECISION_FLOOR):
        return None
    how = ", ".join(choices.names).replace("__gt__", "thresholds")
    return Cell(EXACT, value, f"with the choices that {implementation} makes in fp32 ({how}) in both", allowed)


def _low_precision_failure(subject: Subject, observe: Observe, implementation: str) -> str | None:
    """Why the reference fails in low precision, too; None where it does not."""
    dtype = subject.settings.dtype
    if dtype is torch.float32:
        return None
    try:
        observe(subject.model(implementation, dtype), dtype)
    except Exception as problem:
        return _fails(implementation, dtype, problem)
    finally:
        subject.forget(implementation, dtype)
    return None


def _fails(implementation: str, dtype: torch.dtype, problem: Exception) -> str:
    return f"{implementation} itself fails in {_name(dtype)}: {brief(problem)}"


def _neighbours(
    subject: Subject, observe: Observe, keep: dict[str, Tensor] | None, implementation: str
) -> list[tuple[float, float]]:
    """What low precision costs the reference, and flash_plus, with weights a rounding away: one draw says little of a
    sharp model, whose errors with such weights differ by more than an order of magnitude."""
    dtype = subject.settings.dtype
    kinds = ((implementation, torch.float32), (implementation, dtype), (NAME, dtype))
    models = [build(subject.cls, subject.config, name, kind) for name, kind in kinds]
    found = []
    for seed in range(NEIGHBOURS):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: (value * (1 + torch.finfo(dtype).eps * torch.randn(value.shape, generator=generator))).to(dtype)
            if value.is_floating_point()
            else value
            for name, value in subject.state.items()
        }
        outputs = []
        for model, (_, kind) in zip(models, kinds):
            model.load_state_dict(state)
            outputs.append(observe(model.to(subject.settings.device), kind))
        theirs, ours = (error(outputs[0], other, keep, floor=LOW_FLOOR) for other in outputs[1:])
        found.append((theirs, ours))
    return found


def mean_error(expected: Outputs, actual: Outputs, keep: dict[str, Tensor] | None = None) -> float:
    """The largest root-mean-square difference of a tensor, relative to its own root mean square.

    Tensors that are small beside the largest (a key bias's gradient is zero but for rounding) are measured by that.
    """
    squares = {
        name: float(tensor[tensor.isfinite()].double().square().mean().sqrt())
        for name, tensor in expected.items()
        if tensor.isfinite().any()
    }
    least = max([LOW_FLOOR * value for value in squares.values()], default=0.0)
    worst = 0.0
    for name, want in expected.items():
        got = actual.get(name)
        if got is None or got.shape != want.shape:
            return float("inf")
        want, got = want.double(), got.double()
        if keep is not None and name in keep:
            want, got = want[keep[name]], got[keep[name]]
        finite = want.isfinite() & got.isfinite()
        if finite.any():
            scale = float(want[finite].square().mean().sqrt())
            worst = max(worst, float((want[finite] - got[finite]).square().mean().sqrt()) / max(scale, least, 1e-6))
    return worst


def _sdpa(subject: Subject, observe: Observe) -> Outputs | None:
    """What ``sdpa`` gives, where it runs without NaN."""
    try:
        outputs = observe(subject.model("sdpa"), torch.float32)
    except Exception:
        return None
    return None if has_nan(outputs) else outputs


def _only_nan(outputs: Outputs) -> bool:
    return has_nan(outputs) and all(not bool(tensor.isfinite().any()) for tensor in outputs.values())


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
