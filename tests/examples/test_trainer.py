"""Transformers' Trainer and TRL's SFTTrainer train with flash_plus as they do with sdpa."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import hf_flash_plus


@pytest.fixture(autouse=True)
def _fresh_state():
    hf_flash_plus.dispatch.clear_cache()
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tiny_llama(implementation: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)


def token_rows(count: int = 24) -> list[list[int]]:
    """Sequences of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 100, (9 + 5 * (i % 5),), generator=generator).tolist() for i in range(count)]


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_trainer_trains_like_sdpa(layout, tmp_path):
    from transformers import DataCollatorWithFlattening

    def pad(rows: list[dict]) -> dict:
        width = max(len(row["input_ids"]) for row in rows)
        filled = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        parts = [{**row, "attention_mask": [1] * len(row["input_ids"]), "labels": row["input_ids"]} for row in rows]
        return {
            key: torch.tensor([part[key] + [fill] * (width - len(part[key])) for part in parts])
            for key, fill in filled.items()
        }

    def train(implementation: str) -> list[float]:
        model = tiny_llama(implementation)
        model.config.use_cache = False  # Transformers looks for packed documents only without a cache
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=implementation == "flash_plus")
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **SETTINGS),
            train_dataset=[{"input_ids": row} for row in token_rows()],
            data_collator=collator if layout == "padding_free" else pad,
        )
        return losses(trainer)

    ours, theirs = train("flash_plus"), train("sdpa")
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-2)
    assert hf_flash_plus.providers_used() == ["torch_sdpa"]


@pytest.mark.parametrize("layout", ["padding_free", "packing"])
def test_trl_sft_without_padding_trains_like_sdpa(layout, tmp_path):
    """padding_free: sdpa gets the same documents padded; packing: both get the same packed rows."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 100)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    rows = datasets.Dataset.from_dict({"input_ids": token_rows()})

    def train(implementation: str, **settings) -> list[float]:
        model = tiny_llama(implementation)
        model.config.use_cache = False  # Transformers looks for packed documents only without a cache
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **SETTINGS, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        return losses(trainer)

    if layout == "packing":
        packed = {"packing": True, "packing_strategy": "bfd", "max_length": 64}
        ours, theirs = train("flash_plus", **packed), train("sdpa", **packed)
    else:
        ours, theirs = train("flash_plus", padding_free=True, max_length=None), train("sdpa", max_length=None)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert hf_flash_plus.providers_used() == ["torch_sdpa"]
