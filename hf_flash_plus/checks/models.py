"""A LLaMA and a BERT, tiny and freshly initialised: ``flash_plus`` against eager, forward, backward and generation."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import use_provider
from .compare import DTYPES, ERROR, OK, WRONG, Difference, Row, excess

VOCABULARY = 256
MODELS = ("llama", "bert")
#: Who is asked: whoever automatic selection chooses, with the user's settings.
AUTOMATIC = "automatic"


def checks(model: str, dtype: str) -> list[str]:
    """What is asked of a model; tokens are compared in fp32 only, where rounding does not choose other ones."""
    both = [f"{model} forward", f"{model} backward"]
    return [*both, f"{model} generate"] if model == "llama" and dtype == "fp32" else both


def _build(name: str, implementation: str, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers as tf

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
        "attn_implementation": implementation,
    }
    torch.manual_seed(0)
    if name == "llama":
        config: Any = tf.LlamaConfig(num_key_value_heads=2, bos_token_id=1, eos_token_id=None, **sizes)
        model: Any = tf.LlamaForCausalLM(config)
    else:
        config = tf.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
        model = tf.BertForSequenceClassification(config)
    return model.to(device, dtype)


def _batch(name: str, device: torch.device) -> dict[str, Tensor]:
    """Two rows, one of them padded: on the left for LLaMA, as for generation, on the right for BERT."""
    tokens = torch.randint(1, VOCABULARY, (2, 75), generator=torch.Generator().manual_seed(1)).to(device)
    real = torch.ones_like(tokens)
    if name == "llama":
        real[1, :22] = 0
    else:
        real[1, -22:] = 0
    return {"input_ids": tokens * real, "attention_mask": real}


def _logits(name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    # What a padded query gives is nobody's: flash_plus says 0 there, eager a mean.
    return logits[batch["attention_mask"].bool()] if name == "llama" else logits


def _loss_gradients(name: str, model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    logits = _logits(name, model, batch).float()
    torch.logsumexp(logits, -1).mean().backward()
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def _generate(model: Any, batch: dict[str, Tensor]) -> Tensor:
    out: Tensor = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return out


def _run(name: str, what: str, dtype: torch.dtype, device: torch.device) -> float:
    batch = _batch(name, device)
    ours = _build(name, "flash_plus", dtype, device)
    if ours.config._attn_implementation != "flash_plus":
        raise Difference(f"the model was built with {ours.config._attn_implementation!r} instead of 'flash_plus'")
    exact = _build(name, "eager", torch.float32, device)
    exact.load_state_dict(ours.state_dict())  # the same weights, rounded to the dtype
    eager = _build(name, "eager", dtype, device)
    if what == "generate":
        if not torch.equal(_generate(ours.eval(), batch), _generate(exact.eval(), batch)):
            raise Difference("generates other tokens than eager")
        return 0.0
    if what == "forward":
        with torch.no_grad():
            got, true, rounded = (_logits(name, model.eval(), batch) for model in (ours, exact, eager))
        return excess("logits", got, true.double(), rounded, 2)
    got_all, true_all, rounded_all = (_loss_gradients(name, model.train(), batch) for model in (ours, exact, eager))
    if got_all.keys() != true_all.keys():
        raise Difference(f"gradients reach other weights: {sorted(got_all.keys() ^ true_all.keys())}")
    return max(
        excess(f"the gradient of {key}", got_all[key], true_all[key].double(), rounded_all[key], 3) for key in true_all
    )


def run_check(provider: str, check: str, dtype: str, device: str) -> Row:
    """One check of one model, with the provider of that name or automatic selection; nothing is raised."""
    with _quiet():
        return _run_check(provider, check, dtype, device)


@contextmanager
def _quiet() -> Iterator[None]:
    """What Transformers and this package would warn of goes into the row, not onto the screen."""
    from transformers.utils import logging as transformers_logging

    own, verbosity = logging.getLogger("hf_flash_plus"), transformers_logging.get_verbosity()
    level = own.level
    transformers_logging.set_verbosity_error()
    own.setLevel(logging.ERROR)
    try:
        yield
    finally:
        own.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


def _run_check(provider: str, check: str, dtype: str, device: str) -> Row:
    name, what = check.split()
    begin = time.perf_counter()
    row = Row(provider, check, dtype, OK)
    where = torch.device(device)
    dispatch.clear_cache()
    try:
        with torch.random.fork_rng([where] if where.type == "cuda" else []):
            if provider == AUTOMATIC:
                row.error = _run(name, what, DTYPES[dtype], where)
            else:
                with use_provider(provider):
                    row.error = _run(name, what, DTYPES[dtype], where)
        served = dispatch.providers_used()
        row.note = f"served by {', '.join(served)}"
        if not served:
            row.status, row.note = WRONG, "flash_plus was never called"
    except Difference as error:
        row.status, row.note = WRONG, str(error)
    except Exception as error:
        lines = str(error).splitlines() or ["no message"]
        row.status, row.note = ERROR, f"{type(error).__name__}: {lines[0]}"
    row.seconds = round(time.perf_counter() - begin, 3)
    return row
