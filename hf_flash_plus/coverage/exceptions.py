"""Where eager is not the reference, and differences that are understood. Each row with its reason."""

from __future__ import annotations

import transformers
from packaging import version

# Checks whose reference is ``sdpa`` go by ``(model type, check)``; ``*`` is any check.
_BOOL = "eager adds the boolean mask of the text backbone to its scores instead of masking with it"
_NOT_CAUSAL = "eager makes no causal mask where no padding mask is given"

#: Where eager gives NaN and ``sdpa`` does not (rows that see no key), ``judge`` takes ``sdpa`` by itself.
SDPA_IS_REFERENCE: dict[tuple[str, str], str] = {
    (name, check): "eager gives NaN, at rows that see no key, and generates what NaN leads to"
    for name in ("nemotron3_5_asr", "nemotron_asr_streaming")
    for check in ("generate", "static")
}
#: The same for versions of Transformers before this one.
FIXED_IN = "5.23"
SDPA_WAS_REFERENCE: dict[tuple[str, str], str] = {
    ("kosmos-2", "*"): "all but its image encoder keeps sdpa, which takes the image projection for causal",
    ("kyutai_speech_to_text", "*"): _NOT_CAUSAL,
    ("moshi", "forward"): _NOT_CAUSAL,
    ("moshi", "packed"): _NOT_CAUSAL,
}

#: The same for one part of a model, which is then loaded with ``sdpa`` while the rest stays eager.
SDPA_PART_IS_REFERENCE: dict[tuple[str, str], tuple[str, str]] = {
    ("grounding-dino", "*"): ("text_config", _BOOL),
    ("mm-grounding-dino", "*"): ("text_config", _BOOL),
}

_ONE_ROW = "its Q-Former hands one row of queries for all windows of keys and relies on eager's broadcasting"
#: Checks in which ``flash_plus`` raises, and why, by ``(model type, check)``.
RAISES: dict[tuple[str, str], str] = {
    **{
        (name, check): _ONE_ROW
        for name in ("granite_speech", "granite_speech_plus")
        for check in ("images", "generate", "static")
    },
    ("pp_formulanet", "static"): "its static cache is longer than the encoder's output, and eager attends the slots "
    "that nothing was written to (its own result with a dynamic cache differs by 1.2)",
}


def reference(model_type: str, check: str) -> tuple[str, str]:
    """The implementation that a check is compared with, and why where it is not eager."""
    tables = [SDPA_IS_REFERENCE]
    if version.parse(transformers.__version__) < version.parse(FIXED_IN):
        tables.append(SDPA_WAS_REFERENCE)
    for key in ((model_type, check), (model_type, "*")):
        for table in tables:
            if key in table:
                return "sdpa", table[key]
        if key in SDPA_PART_IS_REFERENCE:
            part, why = SDPA_PART_IS_REFERENCE[key]
            return f"eager, sdpa in {part}", why
    return "eager", ""
