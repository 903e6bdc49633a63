"""The fine-tuning scripts end to end on the CPU: tiny models, few steps, the JSON result checked."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import _common
import finetune_bert
import finetune_llama

import hf_flash_plus

TINY_LLAMA = (
    "--hidden_size 32 --intermediate_size 64 --num_layers 1 --num_heads 4 --num_kv_heads 2 --vocab_size 300 "
    "--seq_length 64 --batch_size 4 --learning_rate 1e-2 --warmup_steps 2 --max_documents 12 --max_eval_rows 6 "
    "--max_new_tokens 4"
).split()
TINY_BERT = (
    "--hidden_size 64 --intermediate_size 64 --num_layers 1 --num_heads 2 --vocab_size 400 --max_length 64 "
    "--batch_size 16 --learning_rate 3e-3 --warmup_steps 2 --num_labels 3 --snippets_per_label 100 "
    "--eval_snippets_per_label 20 --dropout 0"
).split()
COMMON_KEYS = {
    "attn_implementation",
    "providers",
    "device",
    "processes",
    "mixed_precision",
    "parameters",
    "loss_start",
    "loss_end",
    "tokens_per_second",
    "peak_memory_bytes",
    "train_seconds",
    "losses",
    "versions",
    "arguments",
}


@pytest.fixture(autouse=True)
def _fresh_state():
    """The scripts run in this process: each gets an Accelerator of its own, and no provider of an earlier test."""
    hf_flash_plus.dispatch.clear_cache()
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(script, options: list[str], output: Path, steps: int = 20, implementation: str = "flash_plus") -> dict:
    """Run a script's main; returns the JSON result it wrote, after the checks that hold for both scripts."""
    args = ["--attn_implementation", implementation, "--output_dir", str(output), "--max_steps", str(steps)]
    script.main([*options, *args])
    result = json.loads((output / "result.json").read_text())
    assert set(result) >= COMMON_KEYS
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 0
    assert result["arguments"]["max_steps"] == steps
    if implementation == "flash_plus":
        assert result["providers"] == ["torch_sdpa"]
    return result


def test_llama_learns_and_generates(tmp_path, capsys):
    result = run(finetune_llama, TINY_LLAMA, tmp_path, steps=30)
    assert len(result["losses"]) == 30
    assert result["loss_end"] < result["loss_start"] - 0.3
    assert 0 < result["bits_per_byte_end"] < result["bits_per_byte_start"] < 12
    assert result["sample"].startswith("def __init__(self")
    printed = capsys.readouterr().out
    assert "flash_plus, served by torch_sdpa" in printed
    assert "bits/byte" in printed


def test_llama_equals_eager_on_packed_rows(tmp_path):
    """The A/B switch changes the implementation, not the training: packed documents stay apart in both."""
    losses = [
        run(finetune_llama, TINY_LLAMA, tmp_path / name, steps=5, implementation=name)["losses"]
        for name in ("flash_plus", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_same_seed_same_training(tmp_path):
    first, second = (run(finetune_llama, TINY_LLAMA, tmp_path / str(i), steps=4) for i in range(2))
    other = run(finetune_llama, [*TINY_LLAMA, "--seed", "1"], tmp_path / "other", steps=4)
    assert first["losses"] == second["losses"]
    assert first["bits_per_byte_end"] == second["bits_per_byte_end"]
    assert first["sample"] == second["sample"]
    assert first["losses"] != other["losses"]


def test_resume_goes_on_where_it_stopped(tmp_path):
    options = [*TINY_LLAMA, "--checkpoint_every", "4", "--max_new_tokens", "0"]
    whole = run(finetune_llama, options, tmp_path, steps=7)  # its only checkpoint is step 4's
    rest = run(finetune_llama, [*options, "--resume"], tmp_path, steps=7)
    assert rest["losses"] == pytest.approx(whole["losses"][4:], rel=1e-5)


def test_accumulation_bf16_checkpointing_and_tracker(tmp_path):
    pytest.importorskip("tensorboard")
    options = "--gradient_accumulation_steps 2 --mixed_precision bf16 --gradient_checkpointing --report_to tensorboard"
    result = run(finetune_llama, [*TINY_LLAMA, *options.split()], tmp_path, steps=10)
    assert result["mixed_precision"] == "bf16"
    assert len(result["losses"]) == 10
    assert result["loss_end"] < result["loss_start"]
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_llama_from_a_saved_model_with_lora_and_a_train_file(tmp_path):
    pytest.importorskip("peft")
    run(finetune_llama, [*TINY_LLAMA, "--save_model"], tmp_path / "base", steps=2)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"document {i}: " + "abc " * 60}) + "\n" for i in range(20)))
    options = ["--model_name_or_path", str(tmp_path / "base"), "--train_file", str(corpus), "--lora_rank", "4"]
    options += ["--seq_length", "64", "--learning_rate", "2e-2", "--max_new_tokens", "0"]
    result = run(finetune_llama, options, tmp_path / "lora", steps=15)
    assert result["loss_end"] < result["loss_start"]
    assert "sample" not in result


def test_bert_learns_what_folder_a_snippet_comes_from(tmp_path, capsys):
    """Rows of different lengths, so padded batches; files are held out whole, and the label is the folder's name."""
    words = {"colours": "red green blue pink", "animals": "cat dog horse cow", "trees": "oak elm fir ash"}
    for kind, text in words.items():
        (tmp_path / "corpus" / kind).mkdir(parents=True)
        for i in range(4):
            lines = [" ".join(text.split()[j % 4 :] + ["and", "the"] * (j % 7)) for j in range(30 + i)]
            (tmp_path / "corpus" / kind / f"{i}.txt").write_text("\n".join(lines))
    options = [*TINY_BERT, "--train_file", str(tmp_path / "corpus"), "--snippet_chars", "100"]
    result = run(finetune_bert, options, tmp_path, steps=100)
    assert result["loss_end"] < result["loss_start"] - 0.3
    assert result["labels"] == ["animals", "colours", "trees"]
    assert result["accuracy_end"] > 0.8
    assert "flash_plus, served by torch_sdpa" in capsys.readouterr().out


def test_bert_on_a_dataset_of_whole_documents(tmp_path):
    pytest.importorskip("datasets")
    words = {"colours": "red green blue", "animals": "cat dog horse"}
    rows = [{"body": f"{words[kind]} {i}", "kind": kind} for i in range(40) for kind in words]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*TINY_BERT, "--dataset", str(folder), "--text_column", "body", "--label_column", "kind"]
    result = run(finetune_bert, [*options, "--snippets_per_label", "0"], tmp_path, steps=15)
    assert result["labels"] == ["animals", "colours"]
    assert result["accuracy_end"] == 1.0


def test_yaml_file_gives_defaults_and_unknown_names_are_errors(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\nlearning_rate: 3e-4\n")
    data, args, _ = _common.parse_arguments(
        _common.DataArguments,
        _common.TrainArguments,
        finetune_llama.LlamaArguments,
        argv=[str(path), "--batch_size", "3", "--max_steps", "9"],
    )
    assert (args.max_steps, args.learning_rate, args.batch_size) == (9, 3e-4, 3)
    assert data.train_file is None
    path.write_text("max_stepz: 7\n")
    with pytest.raises(SystemExit):
        _common.parse_arguments(_common.TrainArguments, argv=[str(path)])
    assert "max_stepz" in capsys.readouterr().err


@pytest.mark.parametrize("script, name", [(finetune_llama, "llama"), (finetune_bert, "bert")])
def test_demo_configurations_name_existing_arguments(script, name):
    sizes = script.LlamaArguments if name == "llama" else script.BertArguments
    path = ROOT / "configs" / "train" / f"{name}_demo.yaml"
    _, args, _ = _common.parse_arguments(_common.DataArguments, _common.TrainArguments, sizes, argv=[str(path)])
    assert args.output_dir == f"outputs/{name}_demo"


def test_pack_fills_rows_and_keeps_documents_apart():
    documents = [_common.Document("abcdefghij" * n, "") for n in (1, 7, 2, 4)]
    args = _common.TrainArguments(vocab_size=261)
    tokenizer = _common.make_tokenizer(args, [d.text for d in documents])
    rows = finetune_llama.pack(documents, tokenizer, seq_length=32)
    assert rows
    text = ""
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) == 32
        for i, (token, position, label) in enumerate(zip(row["input_ids"], row["position_ids"], row["labels"])):
            if position == 0:  # a document starts: nothing before it predicts it
                assert label == -100
            else:
                assert position == row["position_ids"][i - 1] + 1
                assert label == token
        labels = [label for label in row["labels"] if label not in (-100, tokenizer.eos_token_id)]
        text += tokenizer.decode(labels)
        assert abs(row["num_bytes"] - len(labels)) <= 1.5  # <eos> shares in a document's bytes
    whole = "".join(d.text for d in documents)
    assert whole.startswith(text)
    assert len(whole) - len(text) < 32


def test_hold_out_takes_whole_documents_of_every_label():
    documents = [_common.Document(f"{label}{i}", label) for label in "ab" for i in range(10)]
    train, held_out = _common.hold_out(documents, 0.2)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert sorted(d.label for d in held_out) == ["a", "a", "b", "b"]
    (head,), (tail,) = _common.hold_out([_common.Document("0123456789", "")], 0.2)
    assert (head.text, tail.text) == ("01234567", "89")


def test_bits_per_byte_of_a_uniform_model():
    """A model that gives every token the same chance needs log2(vocabulary) bits a token."""
    from accelerate import Accelerator

    class Uniform(torch.nn.Module):
        def forward(self, input_ids, **_):
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))

    rows = [
        {"input_ids": [1] * 9, "position_ids": list(range(9)), "labels": [-100] + [1] * 8, "num_bytes": 4.0 + i}
        for i in range(3)
    ]
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, collate_fn=lambda batch: finetune_llama.collate(batch, extra=("num_bytes",))
    )
    accelerator = Accelerator(cpu=True)
    value = finetune_llama.bits_per_byte(accelerator, Uniform(), accelerator.prepare(loader))
    assert value == pytest.approx(3 * 8 * 8 / (4 + 5 + 6))


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under `torchrun` with two processes: gradients and metrics are those of both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [str(ROOT / "examples/finetune_bert.py"), *TINY_BERT]
    command += ["--max_steps", "4", "--output_dir", str(tmp_path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert len(result["losses"]) == 4
    assert len(result["labels"]) == 3
    assert done.stdout.count("accuracy     ") == 1
