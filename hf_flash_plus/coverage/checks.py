"""The checks: each observes a model in one way and lets ``judge`` compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from . import multimodal
from .cells import DIFFERENT, EXACT, NOT_RUNNABLE, REFUSED, Cell
from .compare import Outputs, collect, differentiable, error, identical, real_positions, unchanged
from .device import settle
from .exceptions import reference
from .find import brief
from .inputs import BINS, find, padding, parameters_of, random_ids
from .judge import judge
from .subject import NAME, Subject, build, moved, run

NEW_TOKENS = 4
#: Lengths of the documents that the packed check puts into one row.
DOCUMENTS = (5, 4, 6)


def forward(subject: Subject, kind: str) -> Cell | None:
    """The model's own inputs, without a mask."""
    return judge(subject, "forward", lambda model, dtype: collect(run(model, subject.cast(subject.inputs, dtype))))


def padded(how: str) -> Callable[[Subject, str], Cell | None]:
    """A check with padding on one side or inside."""

    def check(subject: Subject, kind: str) -> Cell | None:
        inputs = padded_inputs(subject, how)
        if inputs is None:
            return None
        masks = [inputs["attention_mask"]]
        if "decoder_attention_mask" in inputs:
            masks.append(inputs["decoder_attention_mask"])
        try:
            keep = comparable(subject, inputs, masks)
        except Exception as problem:
            return Cell(NOT_RUNNABLE, note=f"eager itself fails: {brief(problem)}")
        return judge(subject, how, lambda model, dtype: collect(run(model, subject.cast(inputs, dtype))), keep)

    return check


def padded_inputs(subject: Subject, how: str) -> dict[str, Any] | None:
    """The inputs with padding; None where the model takes no padding mask over tokens or sounds."""
    parameters = parameters_of(subject.model("eager"))
    if "attention_mask" not in parameters:
        return None
    ids = subject.inputs.get("input_ids")
    if isinstance(ids, Tensor):
        if ids.dim() != 2 or ids.shape[0] != 2:
            return None
        mask = padding(how, *ids.shape)
    else:
        length = _sound_length(subject)
        if length is None or how != "right":
            return None
        mask = padding(how, 2, length)
    inputs = {**subject.inputs, "attention_mask": mask}
    target = subject.inputs.get("decoder_input_ids")
    decodes = "decoder_attention_mask" in parameters and getattr(subject.config, "is_encoder_decoder", False)
    if how == "right" and decodes and isinstance(target, Tensor) and len(target) == len(mask):
        inputs["decoder_attention_mask"] = padding(how, *target.shape[:2])
    return inputs


def _sound_length(subject: Subject) -> int | None:
    values, features = subject.inputs.get("input_values"), subject.inputs.get("input_features")
    if isinstance(values, Tensor) and values.dim() == 2:
        return values.shape[1]
    if isinstance(features, Tensor) and features.dim() == 3:
        bins = {find(subject.config, name) for name in BINS}
        return features.shape[1] if features.shape[2] in bins else features.shape[2]
    return None


def comparable(subject: Subject, inputs: dict[str, Any], masks: list[Tensor]) -> dict[str, Tensor]:
    """Which elements of the outputs say something about real tokens.

    Where the shape of an output does not tell (pooled, subsampled), the elements that eager leaves as they are when
    only the content of the padding changes.
    """
    eager = subject.model("eager")
    device = subject.settings.device
    if device != "cpu":
        _try_indices(eager, inputs)
    first = collect(run(eager, subject.cast(inputs, torch.float32)))
    keep, unclear = real_positions(first, [mask.to(device) for mask in masks])
    if not unclear:
        return keep
    changed = dict(inputs)
    hidden = inputs["attention_mask"] == 0
    for name in ("input_ids", "input_values", "input_features"):
        value = inputs.get(name)
        if not isinstance(value, Tensor):
            continue
        if value.shape[:2] == hidden.shape:
            where = hidden.reshape(hidden.shape + (1,) * (value.dim() - 2))
        elif value.dim() == 3 and value.shape[2] == hidden.shape[1]:
            where = hidden[:, None]
        else:
            continue
        batch, length = value.shape[:2]
        other = value.flip(0) if value.is_floating_point() else random_ids(subject.config, batch, length, seed=9)
        changed[name] = torch.where(where, other, value)
    second = collect(run(eager, subject.cast(changed, torch.float32)))
    for name in unclear:
        if name in second and second[name].shape == first[name].shape:
            keep[name] = unchanged(first[name], second[name])
    return keep


def _try_indices(model: Any, inputs: dict[str, Any]) -> None:
    """Run a model on the CPU, where an index out of range is an exception: on a GPU it costs the process its device.

    Raises:
        IndexError: there is one.
    """
    try:
        run(
            copy.deepcopy(model).to("cpu"), {name: moved(value, "cpu", torch.float32) for name, value in inputs.items()}
        )
    except IndexError:
        raise
    except Exception:
        return  # whatever else there is, the device's own run has to show it


def gradients(subject: Subject, kind: str) -> Cell | None:
    """The gradients of all parameters, from a loss over the outputs at real positions."""
    inputs = padded_inputs(subject, "left") or padded_inputs(subject, "right")
    note = ""
    if inputs is not None:
        cell = _gradients(subject, inputs, [inputs["attention_mask"]])
        if cell.outcome != NOT_RUNNABLE:
            return cell
        note = cell.note
    cell = _gradients(subject, subject.inputs, [])
    return cell if cell.outcome != NOT_RUNNABLE or not note else Cell(NOT_RUNNABLE, note=note)


def _gradients(subject: Subject, inputs: dict[str, Any], masks: list[Tensor]) -> Cell:
    if masks:
        try:
            keep = comparable(subject, inputs, masks)
        except Exception as problem:
            return Cell(NOT_RUNNABLE, note=f"eager itself fails: {brief(problem)}")
    else:
        keep = {}

    def observe(model: Any, dtype: torch.dtype) -> Outputs:
        model.zero_grad(set_to_none=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        torch.manual_seed(0)
        with torch.enable_grad():
            outputs = differentiable(model(**subject.cast(inputs, dtype)))
            loss: Any = 0.0
            for index, (name, tensor) in enumerate(sorted(outputs.items())):
                tensor = tensor[keep[name]] if name in keep else tensor
                tensor = tensor[tensor.isfinite()]
                if tensor.numel() and tensor.is_floating_point():
                    weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index))
                    loss = loss + (tensor.to(dtype) * weights.to(tensor.device, dtype)).mean()
            if not isinstance(loss, Tensor):
                raise ValueError("no output carries a gradient")
            loss.backward()
        found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    # A bias on the keys has gradient zero but for rounding: such gradients are measured by the largest of all.
    return judge(subject, "gradients", observe, floor=1e-2)


def packed(subject: Subject, kind: str) -> Cell | None:
    """Several documents in one row, told apart by ``position_ids`` alone."""
    if kind not in ("text decoder", "multimodal") or "input_ids" not in subject.inputs:
        return None
    parameters = parameters_of(subject.model("eager"))
    if "position_ids" not in parameters or set(subject.inputs) - {"input_ids"}:
        return None
    ids = random_ids(subject.config, 1, sum(DOCUMENTS), seed=2)
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]
    options = {"use_cache": False} if "use_cache" in parameters or "kwargs" in parameters else {}

    def together(model: Any, dtype: torch.dtype) -> Outputs:
        device = subject.settings.device
        output = run(model, {"input_ids": ids.to(device), "position_ids": positions.to(device), **options})
        return _per_token(collect(output), ids.shape[1])

    def alone(model: Any, dtype: torch.dtype) -> Outputs:
        if getattr(model.config, "_attn_implementation", None) == NAME:
            return together(model, dtype)
        parts = []
        for part in ids.split(DOCUMENTS, dim=1):
            output = run(model, {"input_ids": part.to(subject.settings.device), **options})
            parts.append(_per_token(collect(output), part.shape[1]))
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    cell = judge(subject, "packed", together)
    if cell.outcome != DIFFERENT:
        return cell
    second = judge(subject, "packed", alone)
    if second.outcome == EXACT:
        return Cell(EXACT, second.error, "against each document alone: eager lets packed documents see each other here")
    return cell


def _per_token(outputs: Outputs, length: int) -> Outputs:
    return {name: tensor for name, tensor in outputs.items() if tensor.dim() >= 2 and tensor.shape[:2] == (1, length)}


def generate(cache: str | None) -> Callable[[Subject, str], Cell | None]:
    """A check of greedy generation, with a dynamic (None) or a ``static`` cache."""
    check_name = "static" if cache else "generate"

    def check(subject: Subject, kind: str) -> Cell | None:
        if not generates(subject):
            return None
        base = subject.images or subject.inputs
        attempts = []
        plain = {name: value for name, value in base.items() if not name.startswith("decoder_")}
        if subject.images is None:
            with_padding = padded_inputs(subject, "left")
            if with_padding is not None:
                attempts.append({n: v for n, v in with_padding.items() if not n.startswith("decoder_")})
        else:
            attempts.append(multimodal.padded(plain))
        attempts.append(plain)
        if subject.images is not None:
            attempts.append(subject.inputs)
        cell = None
        for inputs in attempts:
            cell = judge(subject, check_name, lambda model, dtype: _generated(model, subject, inputs, dtype, cache))  # noqa: B023
            if cell.outcome != NOT_RUNNABLE:
                return cell
        return cell

    return check


def generates(subject: Subject) -> bool:
    """Whether a model can generate tokens."""
    return bool(getattr(subject.cls, "can_generate", lambda: False)())


def _generated(model: Any, subject: Subject, inputs: dict[str, Any], dtype: torch.dtype, cache: str | None) -> Outputs:
    torch.manual_seed(0)
    options: dict[str, Any] = {"cache_implementation": cache} if cache else {}
    settings = model.generation_config
    low = subject.settings.dtype is not torch.float32
    forced = _prescribed(inputs) if low else None
    if forced is not None:
        options["logits_processor"] = LogitsProcessorList([forced])
    if model.config.is_encoder_decoder and settings.decoder_start_token_id is None and settings.bos_token_id is None:
        options["decoder_start_token_id"] = 2
    with torch.no_grad():
        output = model.generate(
            **subject.cast(inputs, dtype),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
            disable_compile=True,
            **options,
        )
    if not hasattr(output, "sequences"):
        return collect(output)
    result: Outputs = {}
    logits = list(getattr(output, "logits", None) or ())
    if low and (forced is None or not forced.followed(output.sequences)):
        logits = logits[:1]  # rounding may choose other tokens, after which nothing can be compared
    if not low:
        result["sequences"] = output.sequences.to(dtype)
    result.update({f"logits.{step}": tensor for step, tensor in enumerate(logits)})
    return result


class _Prescribed(LogitsProcessor):
    """Puts in given tokens, step by step, whatever the logits say: in low precision they would part by rounding."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[:, self.step, None].to(scores.device)
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)

    def followed(self, sequences: Tensor) -> bool:
        """Whether the tokens came to stand at the end of what was generated."""
        return torch.equal(sequences[:, -self.tokens.shape[1] :].cpu(), self.tokens)


def _prescribed(inputs: dict[str, Any]) -> _Prescribed | None:
    """Tokens to put in: those of the prompt once more, which every model knows how to take."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < NEW_TOKENS:
        return None
    return _Prescribed(ids[:, -NEW_TOKENS:].cpu())


def images(subject: Subject, kind: str) -> Cell | None:
    """Images or audio in the prompt, without and with left padding."""
    if subject.images is None:
        return Cell(NOT_RUNNABLE, note=subject.images_error) if subject.images_error else None
    inputs = subject.images
    cell = judge(subject, "images", lambda model, dtype: collect(run(model, subject.cast(inputs, dtype))))
    if cell.outcome != EXACT:
        return cell
    with_padding = multimodal.padded(inputs)
    try:
        keep = comparable(subject, with_padding, [with_padding["attention_mask"]])
    except Exception:
        return cell
    second = judge(subject, "images", lambda model, dtype: collect(run(model, subject.cast(with_padding, dtype))), keep)
    if second.outcome in (DIFFERENT, REFUSED):
        return Cell(second.outcome, second.error, f"with left padding: {second.note}")
    return cell


def patch(subject: Subject, kind: str) -> Cell | None:
    """Patching a loaded model and taking it back."""
    from ..integration.patch import patch_model, unpatch_model

    dtype = subject.settings.dtype
    inputs = subject.cast(subject.inputs, dtype)
    # Parts that keep their own attention are then the same in both ways of switching.
    implementation, _ = reference(subject.model_type, "patch")
    # Both fresh: some models remember positions from one forward to the next, and return them.
    model, other = _fresh(subject, implementation), _fresh(subject, NAME)
    try:
        before = _last_of(2, model, inputs)
        again = collect(run(model, inputs))
        settle(subject.settings.device)
    except Exception as problem:
        return Cell(NOT_RUNNABLE, note=f"{implementation} itself fails: {brief(problem)}")
    if not identical(before, again):
        return Cell(NOT_RUNNABLE, note=f"{implementation} differs from itself from run to run")
    first = _last_of(2, other, inputs)
    loaded = collect(run(other, inputs))
    try:
        patch_model(model)
    except ValueError as problem:
        return Cell(REFUSED, note=" ".join(str(problem).split()))
    during = collect(run(model, inputs))
    unpatch_model(model)
    after = collect(run(model, inputs))
    if not identical(before, after):
        return Cell(DIFFERENT, error(before, after), "unpatch_model does not restore the model")
    if not identical(loaded, during):
        value, own = error(loaded, during), error(first, loaded)
        if 0 < own < float("inf") and value <= 2 * own:
            return Cell(EXACT, value, f"flash_plus differs from itself by {own:.1e} from run to run")
        note = "patch_model differs from loading with flash_plus"
        return Cell(EXACT if value <= subject.settings.tolerance else DIFFERENT, value, note)
    return Cell(EXACT)


def _fresh(subject: Subject, implementation: str) -> Any:
    """A model that has not run yet, with the weights that all share, in the sweep's precision."""
    model = build(subject.cls, subject.config, implementation, subject.settings.dtype)
    model.load_state_dict(subject.state)
    return model.to(subject.settings.device).eval()


def _last_of(times: int, model: Any, inputs: dict[str, Any]) -> Outputs:
    """What the last of several forwards returns: from the second on, what a model remembers is as after any other."""
    return [collect(run(model, inputs)) for _ in range(times)][-1]


#: The functions of the checks, in order. Each gets the subject and its kind; None: the check does not apply.
FUNCTIONS: dict[str, Callable[[Subject, str], Cell | None]] = {
    "forward": forward,
    "left": padded("left"),
    "right": padded("right"),
    "inner": padded("inner"),
    "gradients": gradients,
    "packed": packed,
    "generate": generate(None),
    "static": generate("static"),
    "images": images,
    "patch": patch,
}
