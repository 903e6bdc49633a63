"""Where eager is not the reference, and differences that are understood. Each row with its reason."""

from __future__ import annotations

#: Checks whose reference is ``sdpa``, by ``(model type, check)``; ``*`` is any check.
_NAN = "eager gives NaN at rows that see no key, and they spread"
_BOOL = "eager adds the boolean mask of the text backbone to its scores instead of masking with it"
SDPA_IS_REFERENCE: dict[tuple[str, str], str] = {
    ("nemotron3_5_asr", "*"): _NAN,
    ("nemotron_asr_streaming", "*"): _NAN,
    ("nemotron_asr_streaming_encoder", "*"): _NAN,
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
    for key in ((model_type, check), (model_type, "*")):
        if key in SDPA_IS_REFERENCE:
            return "sdpa", SDPA_IS_REFERENCE[key]
        if key in SDPA_PART_IS_REFERENCE:
            part, why = SDPA_PART_IS_REFERENCE[key]
            return f"eager, sdpa in {part}", why
    return "eager", ""
