"""What is particular to single model families: which can take ``flash_plus``, and how. One row a family.

Everything else in ``integration`` treats all models alike.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from packaging import version

#: Families (``config.model_type``, also as a prefix) whose model code reads the mask itself: they get a dense one.
DENSE_MASK_MODELS: dict[str, str] = {
    "doge": "indexes the mask to build its dynamic mask",
    "lasr": "combines the mask with its own",
    "nemotron_asr": "inverts the mask",
    "parakeet": "combines the mask with its relative position bias",
    "t5gemma2": "concatenates the masks of self and cross attention",
    "deepseek_v32": "its indexer scores keys under the mask",
    "glm_moe_dsa": "its indexer scores keys under the mask",
    "axk2": "its indexer scores keys under the mask",
    "hy_v4": "its indexer scores keys under the mask",
    "mistral_large4": "its indexer scores keys under the mask",
    "sam3": "takes any mask that is not boolean for a position bias",
    "dots3_note": "its indexer scores keys under the mask",
}

#: Families that extend the mask by additive biases of their own: they get a dense additive one, as eager does.
ADDITIVE_MASK_MODELS: dict[str, str] = {
    "bigbird_pegasus": "its encoder adds the mask to the scores itself",
    "informer": "its ProbSparse attention adds the mask to the scores itself",
    "qwen4_exp": "its indexer reads the additive mask",
    "gemma4_audio": "its audio encoder reads where an additive mask is not zero",
    "deepseek_v4": "appends the bias of its compressed keys to the mask",
    "beit": "adds its relative position bias to the mask",
    "nllb-moe": "its routers read which tokens an additive mask hides",
}

#: Families that work on the mask of a single query row themselves: that one is dense, as sdpa gets it. (On the CPU
#: every mask of one row is.)
DENSE_ONE_ROW_MODELS: dict[str, str] = {
    "siglip2": "its pooling query hands the mask to torch.nn.MultiheadAttention",
    "lightglue": "makes one row for all keypoints and swaps the keys of a pair of images in it",
}

#: Encoders (``config.model_type``) in which nothing but attention mixes tokens: what their padding computes reaches no
#: real token, so attention leaves the rows after the last real token out.
TOKENWISE_ENCODERS = frozenset(
    "albert bert camembert data2vec-text distilbert electra ernie layoutlm megatron-bert mobilebert modernbert rembert "
    "roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()
)


#: Decoders of the same kind. Transformers' own flash attention gives 0 at padding, too.
TOKENWISE_DECODERS = frozenset(
    "gemma gemma2 gemma3_text gpt2 gpt_neox granite llama ministral mistral olmo2 olmo3 opt phi phi3 qwen2 qwen3 "
    "smollm3 stablelm starcoder2".split()
)


@dataclass(frozen=True)
class Refusal:
    """Why a family keeps its own attention; ``before``: the version of Transformers from which on it need not."""

    reason: str
    before: str | None = None


_FULL = "passes no mask to layers whose is_causal flag is set, and means full attention"

#: Families (as above) that would be computed wrongly: they keep their own attention.
UNSUPPORTED_MODELS: dict[str, Refusal] = {
    "bridgetower": Refusal(f"its image stream {_FULL}"),
    "diffusion_gemma": Refusal("its decoder passes no mask beside a sliding_window, and means full attention"),
    "kosmos-2": Refusal(f"its image projection {_FULL}", before="5.23"),
    "kosmos_2_text_model": Refusal(f"its image projection {_FULL}", before="5.23"),
    "pixtral": Refusal("it drops its mask between images for every name that holds 'flash'", before="5.23"),
}

#: Modeling modules that choose their attention class from a dictionary when a layer is built, and call
#: ``_flash_attention_forward`` directly: ``class_dict.py`` teaches their flash class our masks.
CLASS_DICT_MODULES: dict[str, str] = {
    "gptj": "GPTJ_ATTENTION_CLASSES",
    "gpt_neo": "GPT_NEO_ATTENTION_CLASSES",
    "falcon": "FALCON_ATTENTION_CLASSES",
    "bark": "BARK_ATTENTION_CLASSES",
}


def dense_mask_kind(config: Any) -> str | None:
    """``"bool"`` or ``"additive"`` where the model of this config reads its masks, so that they must be dense;
    ``"one row"`` where it reads those of a single query row only."""
    return _dense_mask_kind(getattr(config, "model_type", None))


@cache  # asked for every mask; configurations are slow to read
def _dense_mask_kind(model_type: Any) -> str | None:
    kinds = {"bool": DENSE_MASK_MODELS, "additive": ADDITIVE_MASK_MODELS, "one row": DENSE_ONE_ROW_MODELS}
    for kind, families in kinds.items():
        if any(_is_of_family(model_type, name) for name in families):
            return kind
    return None


def skips_padded_rows(config: Any) -> bool:
    """Whether the queries of padding on the right need no attention. Never beside cross-attention to other tokens."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return False
    return getattr(config, "model_type", None) in TOKENWISE_ENCODERS | TOKENWISE_DECODERS


def _is_of_family(model_type: Any, family: str) -> bool:
    return isinstance(model_type, str) and (model_type == family or model_type.startswith(family + "_"))


def class_dict_family(module_name: str) -> str | None:
    """The family in :data:`CLASS_DICT_MODULES` that a modeling module belongs to, or None."""
    family = module_name.rpartition(".modeling_")[2]
    return family if family in CLASS_DICT_MODULES else None


@cache
def _module_reason(module_name: str) -> str | None:
    """Why the attention classes of a modeling module cannot be switched; None when they can."""
    if class_dict_family(module_name):
        return None
    module = sys.modules.get(module_name)
    if module is None:
        return f"its module {module_name} is not loaded, so its attention cannot be inspected"
    for name, value in vars(module).items():
        if name.endswith("ATTENTION_CLASSES") and isinstance(value, dict):
            return f"it chooses its attention from {name}, which has no entry that flash_plus could serve"
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return f"the source of {module_name} cannot be read, so its attention cannot be inspected"
    has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    if has_attention and "ALL_ATTENTION_FUNCTIONS" not in source:
        return "its attention does not go through Transformers' attention interface (ALL_ATTENTION_FUNCTIONS)"
    return None


def unsupported_reason(model: Any) -> str | None:
    """Why this (sub)model's own attention cannot be ``flash_plus``; None when it can.

    Args:
        model: a ``PreTrainedModel``, possibly still under construction (only its class and config are read).
    """
    module_name = type(model).__module__
    if class_dict_family(module_name) == "falcon" and getattr(model.config, "alibi", False):
        return "Falcon with ALiBi adds its bias to a dense mask that its flash attention class never sees"
    for name, refusal in UNSUPPORTED_MODELS.items():
        fixed = refusal.before is not None and version.parse(transformers.__version__) >= version.parse(refusal.before)
        if not fixed and _is_of_family(getattr(model.config, "model_type", None), name):
            return refusal.reason
    return _module_reason(module_name)
