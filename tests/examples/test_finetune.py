"""The fine-tuning scripts end to end on the CPU: tiny models, few steps, the JSON result checked."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import common
import finetune_bert
import finetune_llama
from launching import TORCHRUN, launch

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
    "tflops_per_device",
    "mfu",
    "engine",
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
    torch.use_deterministic_algorithms(False)
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


def test_llama_with_fused_rotary_embeddings_trains_the_same(tmp_path, monkeypatch):
    handles = []
    fuse_rotary = hf_flash_plus.fuse_rotary
    monkeypatch.setattr(hf_flash_plus, "fuse_rotary", lambda model: handles.append(fuse_rotary(model)))
    plain = run(finetune_llama, TINY_LLAMA, tmp_path / "plain", steps=3)
    fused = run(finetune_llama, [*TINY_LLAMA, "--fuse_rotary"], tmp_path / "fused", steps=3)
    assert len(handles) == 1 and len(handles[0].fused) == 1
    handles[0].remove()
    assert fused["losses"] == plain["losses"]


def documents_of_one_length(path: Path, count: int, length: int) -> Path:
    """A corpus of texts of different letters but ``length`` bytes each."""
    texts = [(chr(97 + i % 26) + "ab cd ef gh "[i % 12 :]) * length for i in range(count)]
    path.write_text("".join(json.dumps({"text": text[:length]}) + "\n" for text in texts))
    return path


def test_the_three_ways_to_batch_see_the_same_documents(tmp_path):
    """Eight documents that fill four rows exactly, all in each batch: only the shape of the batch differs."""
    corpus = documents_of_one_length(tmp_path / "corpus.jsonl", 10, 30)  # <bos> and <eos> make 32 tokens of each
    options = [*TINY_LLAMA, "--train_file", str(corpus), "--vocab_size", "261", "--max_new_tokens", "0"]
    options += ["--eval_fraction", "0.2"]
    packed, free, padded = (
        run(finetune_llama, [*options, "--packing", mode, "--batch_size", str(rows)], tmp_path / mode, steps=4)
        for mode, rows in (("packed", 4), ("padding_free", 8), ("padded", 8))
    )
    assert packed["losses"] == pytest.approx(free["losses"], rel=1e-5)
    assert packed["losses"] == pytest.approx(padded["losses"], rel=1e-5)
    assert packed["bits_per_byte_end"] == pytest.approx(free["bits_per_byte_end"], rel=1e-4)


@pytest.mark.parametrize("packing", ["padding_free", "padded"])
def test_llama_equals_eager_without_packing(packing, tmp_path):
    """Documents of different lengths: more than one width of padding, and of flattened rows."""
    options = [*TINY_LLAMA, "--packing", packing, "--compare", "flash_plus,eager", "--max_new_tokens", "0"]
    finetune_llama.main([*options, "--max_steps", "4", "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["largest_loss_gap"] < 1e-3


def test_batches_of_the_modes_that_do_not_pack():
    documents = [common.Document("ab" * n, "") for n in (2, 20)]
    tokenizer = common.make_tokenizer(common.TrainArguments(vocab_size=261), [d.text for d in documents])
    rows = finetune_llama.cut(documents, tokenizer, seq_length=32)
    assert [len(row["input_ids"]) for row in rows] == [6, 32, 11]
    padded = finetune_llama.collate_padded(rows, tokenizer.pad_token_id)
    assert padded["input_ids"].shape == (3, 32)
    assert padded["attention_mask"].sum(1).tolist() == [6, 32, 11]
    assert (padded["labels"] != -100).sum(1).tolist() == [5, 31, 10]
    free = finetune_llama.collate_padding_free(rows)
    assert free["input_ids"].shape == (1, 49)
    assert free["cu_seq_lens_q"].tolist() == [0, 6, 38, 49]
    pairs = 6 * 7 // 2 + 32 * 33 // 2 + 11 * 12 // 2
    assert common.attended_pairs(free, causal=True) == common.attended_pairs(padded, causal=True) == pairs
    assert common.attended_pairs(padded, causal=False) == 6**2 + 32**2 + 11**2


def test_compare_trains_with_both_and_plots_both(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options = [*TINY_LLAMA, "--compare", "flash_plus,sdpa", "--max_steps", "5", "--output_dir", str(tmp_path)]
    finetune_llama.main(options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["compare"] == ["flash_plus", "sdpa"]
    assert [run["attn_implementation"] for run in result["runs"].values()] == ["flash_plus", "sdpa"]
    assert [run["providers"] for run in result["runs"].values()] == [["torch_sdpa"], []]
    first, second = (run["losses"] for run in result["runs"].values())
    assert len(first) == 5
    assert first == pytest.approx(second, rel=1e-4)
    assert result["largest_loss_gap"] == max(abs(a - b) for a, b in zip(first, second))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "losses       differ by at most" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--compare"):
        finetune_llama.main([*options, "--save_model"])


def test_compare_goes_on_with_what_has_run(tmp_path, capsys):
    options = [*TINY_LLAMA, "--max_steps", "3", "--max_new_tokens", "0", "--output_dir", str(tmp_path), "--resume"]
    finetune_llama.main([*options, "--compare", "flash_plus,sdpa"])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("flash_plus", "sdpa"))
    assert json.loads((tmp_path / "result.json").read_text())["runs"] == {"flash_plus": one, "sdpa": two}
    capsys.readouterr()
    finetune_llama.main([*options, "--compare", "flash_plus,eager,sdpa"])
    printed = capsys.readouterr().out
    assert "flash_plus: has run before" in printed and "sdpa: has run before" in printed
    assert "eager: has run before" not in printed
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert runs["flash_plus"] == one and runs["sdpa"] == two and len(runs["eager"]["losses"]) == 3
    finetune_llama.main([*options, "--compare", "sdpa,eager", "--max_steps", "4"])  # not the same training
    assert "has run before" not in capsys.readouterr().out


def test_plot_without_matplotlib_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    common.plot_losses(tmp_path / "loss.png", {"flash_plus": [1.0]})
    assert not list(tmp_path.iterdir())
    assert "no loss.png: matplotlib is not installed (pip install matplotlib)" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_and_deterministic(tmp_path, monkeypatch):
    """What torch.compile captures (aot_eager: no C++ compiler needed) trains as eager code does."""
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")  # so that it is taken back afterwards
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    tiny = [*TINY_LLAMA, "--max_eval_rows", "4"]  # one shape in all
    eager = run(finetune_llama, [*tiny, "--deterministic"], tmp_path / "eager", steps=3)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    torch.use_deterministic_algorithms(False)
    options = [*tiny, "--compile", "--compile_backend", "aot_eager", "--save_model"]
    compiled = run(finetune_llama, options, tmp_path / "compiled", steps=3)
    torch._dynamo.reset()
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    assert compiled["sample"].startswith("def __init__(self")
    from safetensors import safe_open

    with safe_open(tmp_path / "compiled" / "model.safetensors", "pt") as saved:
        assert not any("_orig_mod" in key for key in saved.keys())  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_lora_with_gradient_checkpointing_equals_sdpa(precision, tmp_path):
    """PEFT leaves norms in fp32; recomputed activations need inputs that require gradients."""
    pytest.importorskip("peft")
    options = [*TINY_LLAMA, "--lora_rank", "4", "--gradient_checkpointing", "--mixed_precision", precision]
    options += ["--compare", "flash_plus,sdpa", "--max_new_tokens", "0", "--max_steps", "4"]
    finetune_llama.main([*options, "--output_dir", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["largest_loss_gap"] < (1e-3 if precision == "no" else 2e-2)
    assert len(set(result["runs"]["flash_plus"]["losses"])) == 4


def test_flops_count_all_projections_and_half_of_causal_attention():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    per_token, per_pair = common.training_flops(model)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert per_token == 6 * (2 * layer + 32 * 100)
    assert per_pair == 2 * 12 * 32
    batch = {"position_ids": torch.arange(64)[None], "input_ids": torch.zeros(1, 64)}
    assert common.attended_pairs(batch, causal=True) == 64 * 65 // 2
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert common.training_flops(adapted)[0] == 4 * (2 * layer + 32 * 100) + 6 * 2 * (32 + 32)


def test_mfu_needs_a_known_peak(tmp_path):
    unknown = run(finetune_llama, TINY_LLAMA, tmp_path / "unknown", steps=2)
    known = run(finetune_llama, [*TINY_LLAMA, "--peak_tflops", "2"], tmp_path / "known", steps=2)
    assert unknown["mfu"] is None
    assert known["mfu"] == pytest.approx(known["tflops_per_device"] / 2)
    assert 0 < known["mfu"] < 1


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


@pytest.mark.parametrize("tracker, files", [("tensorboard", "events.out.tfevents*"), ("trackio", "*.db")])
def test_accumulation_bf16_checkpointing_and_tracker(tracker, files, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(tracker)
    options = "--gradient_accumulation_steps 2 --mixed_precision bf16 --gradient_checkpointing --report_to"
    result = run(finetune_llama, [*TINY_LLAMA, *options.split(), tracker], tmp_path, steps=10)
    assert result["mixed_precision"] == "bf16"
    assert len(result["losses"]) == 10
    assert result["loss_end"] < result["loss_start"]
    assert list(tmp_path.rglob(files))


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


def test_bert_without_padding_trains_the_same(tmp_path, monkeypatch):
    corpus = tmp_path / "rows.jsonl"
    rows = [{"text": "one two three four five six "[: 4 + i % 24], "label": str(i % 2)} for i in range(64)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pytest.importorskip("datasets")
    called = []
    skip_padding = hf_flash_plus.skip_padding
    monkeypatch.setattr(hf_flash_plus, "skip_padding", lambda model: called.append(skip_padding(model)))
    options = [*TINY_BERT, "--train_file", str(corpus), "--snippets_per_label", "0", "--dropout", "0"]
    padded = run(finetune_bert, options, tmp_path / "padded", steps=6)
    skipped = run(finetune_bert, [*options, "--skip_padding"], tmp_path / "skipped", steps=6)
    assert len(called) == 1
    assert skipped["losses"] == pytest.approx(padded["losses"], rel=1e-3)
    assert skipped["tokens_per_second"] > 0


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


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_bert_from_a_file_of_labelled_rows_reports_accuracy_and_f1(kind, tmp_path):
    words = {"colours": "red green blue", "animals": "cat dog horse"}
    rows = [{"text": f"{words[label]} {i}", "label": label} for i in range(40) for label in words]
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    options = [*TINY_BERT, "--train_file", str(path), "--snippets_per_label", "0"]
    result = run(finetune_bert, options, tmp_path, steps=15)
    assert result["labels"] == ["animals", "colours"]
    assert result["accuracy_end"] == result["f1_end"] == 1.0


def test_accuracy_and_f1_of_known_predictions():
    from types import SimpleNamespace

    from accelerate import Accelerator

    class Model(torch.nn.Module):
        def forward(self, says, labels):
            return SimpleNamespace(logits=torch.nn.functional.one_hot(says, 4).float())

    expected, says = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2]  # label 3 never occurs
    rows = [{"says": s, "labels": e} for s, e in zip(says, expected)]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(rows, batch_size=4))
    accuracy, f1 = finetune_bert.evaluate(accelerator, Model(), loader, 4)
    assert accuracy == pytest.approx(4 / 6)
    assert f1 == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_yaml_file_gives_defaults_and_unknown_names_are_errors(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 7\nlearning_rate: 3e-4\n")
    data, args, _ = common.parse_arguments(
        common.DataArguments,
        common.TrainArguments,
        finetune_llama.LlamaArguments,
        argv=[str(path), "--batch_size", "3", "--max_steps", "9"],
    )
    assert (args.max_steps, args.learning_rate, args.batch_size) == (9, 3e-4, 3)
    assert data.train_file is None
    path.write_text("max_stepz: 7\n")
    with pytest.raises(SystemExit):
        common.parse_arguments(common.TrainArguments, argv=[str(path)])
    assert "max_stepz" in capsys.readouterr().err


@pytest.mark.parametrize("script, name", [(finetune_llama, "llama"), (finetune_bert, "bert")])
def test_demo_configurations_name_existing_arguments(script, name):
    sizes = script.LlamaArguments if name == "llama" else script.BertArguments
    path = ROOT / "configs" / "train" / f"{name}_demo.yaml"
    _, args, _ = common.parse_arguments(common.DataArguments, common.TrainArguments, sizes, argv=[str(path)])
    assert args.output_dir == f"outputs/{name}_demo"


def test_pack_fills_rows_and_keeps_documents_apart():
    documents = [common.Document("abcdefghij" * n, "") for n in (1, 7, 2, 4)]
    args = common.TrainArguments(vocab_size=261)
    tokenizer = common.make_tokenizer(args, [d.text for d in documents])
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
    documents = [common.Document(f"{label}{i}", label) for label in "ab" for i in range(10)]
    train, held_out = common.hold_out(documents, 0.2)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(documents)
    assert sorted(d.label for d in held_out) == ["a", "a", "b", "b"]
    (head,), (tail,) = common.hold_out([common.Document("0123456789", "")], 0.2)
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


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under `torchrun` with two processes: gradients and metrics are those of both."""
    script = str(ROOT / "examples/finetune_bert.py")
    options = ["--max_steps", "4", "--output_dir", str(tmp_path)]
    printed = launch(*TORCHRUN, "--nproc_per_node", "2", script, *TINY_BERT, *options)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["processes"] == 2
    assert len(result["losses"]) == 4
    assert len(result["labels"]) == 3
    assert printed.count("accuracy     ") == 1
