"""Finding a configuration, class and inputs under which a model type runs in eager mode."""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import configuration_auto, modeling_auto

from . import inputs as make
from .compare import collect, has_nan
from .memory import MEMORY, out_of_memory
from .overrides import CLASSES, SKIP
from .subject import Settings, Subject, build, enlarge, parameters, run, usable
from .tiny_configs import all_configs, tiny_config

#: Models with more parameters than this are not built (fp32 weights, twice, and their gradients).
MAX_PARAMETERS = 150_000_000
_FIRST = (
    "SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT MULTIMODAL_LM MASKED_LM CAUSAL_LM PRETRAINING".split()
)
_LAST = "BACKBONE".split()
_CLASSES_TRIED = 4
_ATTEMPTS = ((True, True), (True, False), (False, True), (False, False))


def _mappings() -> list[Any]:
    names = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_MAPPING")]
    order = [f"MODEL_FOR_{name}_MAPPING" for name in _FIRST] + ["MODEL_MAPPING"]
    last = [f"MODEL_FOR_{name}_MAPPING" for name in _LAST]
    rest = [name for name in names if name not in order and name not in last]
    return [getattr(modeling_auto, name) for name in (*order, *rest, *last) if hasattr(modeling_auto, name)]


def model_types() -> list[str]:
    """Every model type of the installed Transformers that has an auto class."""
    named = {key for mapping in _mappings() for key in mapping._model_mapping}
    return [name for name in configuration_auto.CONFIG_MAPPING_NAMES if name in named]


def auto_classes(model_type: str) -> list[Any]:
    """The auto classes of a model type, those with a language-model head first."""
    import transformers

    wanted = CLASSES.get(model_type)
    if wanted is not None:
        return [getattr(transformers, name) for name in wanted if hasattr(transformers, name)]
    found: list[Any] = []
    for mapping in _mappings():
        names = mapping._model_mapping.get(model_type)
        for name in (names,) if isinstance(names, str) else names or ():
            cls = getattr(transformers, name, None)
            if cls is not None and cls not in found:
                found.append(cls)
    return found


def find_subject(model_type: str, settings: Settings) -> Subject | str:
    """A model type ready to be compared, or the reason why it does not run."""
    if model_type in SKIP:
        return SKIP[model_type]
    try:
        classes = auto_classes(model_type)[:_CLASSES_TRIED]
    except Exception as problem:
        return f"class: {brief(problem)}"
    if not classes:
        return "no auto class can be imported"
    reasons: list[str] = []
    for tiny, rebuild in _ATTEMPTS:
        try:
            config = tiny_config(model_type, tiny, rebuild)
        except Exception as problem:
            reasons.append(f"configuration: {brief(problem)}")
            continue
        for cls in classes:
            try:
                found = _try(model_type, cls, config, settings)
            except Exception as problem:
                found = f"{cls.__name__}: {brief(problem)}"
            if isinstance(found, Subject):
                found.how = ("tiny" if tiny else "default widths") + ("" if rebuild else ", set in place")
                return found
            reasons.append(found)
    return next((reason for reason in reasons if not reason.startswith("configuration")), reasons[0])


def _try(model_type: str, cls: Any, config: Any, settings: Settings) -> Subject | str:
    config = _config_of(cls, config)
    count = parameters(cls, config)
    if count > MAX_PARAMETERS:
        return f"{cls.__name__}: too large ({count / 1e6:.0f} million parameters)"
    eager = build(cls, config, "eager")
    problem: Exception | None = None
    for inputs in make.candidates(eager, model_type):
        try:
            outputs = collect(run(eager, inputs))
        except Exception as error:
            problem = problem or error
            continue
        if not outputs:
            problem = problem or ValueError("its output holds no floating tensor")
            continue
        subject = Subject(model_type, cls, config, inputs, settings)
        fresh = {name: tensor.clone() for name, tensor in eager.state_dict().items()}
        finite = not has_nan(outputs)
        enlarge(eager)
        try:
            subject.enlarged = usable(eager, inputs) or not finite
        except Exception:
            subject.enlarged = False
        if not subject.enlarged:
            eager.load_state_dict(fresh)
        if settings.dtype is not torch.float32:
            eager.to(settings.dtype).float()  # all models get the weights as the low precision rounds them
        subject.state = {name: tensor.clone() for name, tensor in eager.state_dict().items()}
        return subject
    raise problem or ValueError("there are no inputs to try")


def _config_of(cls: Any, config: Any) -> Any:
    """The configuration of a class, which may be one inside that of the model type."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in all_configs(config) if isinstance(part, wanted)), config)


def brief(problem: BaseException) -> str:
    """An exception in one line."""
    if out_of_memory(problem):
        return MEMORY
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:200]}"
