"""Two and four CPU processes (gloo): the losses are those of one process on the whole batch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
TINY = (
    "--hidden_size 32 --intermediate_size 64 --num_layers 1 --num_heads 4 --num_kv_heads 2 --vocab_size 300 "
    "--seq_length 64 --learning_rate 1e-2 --warmup_steps 2 --max_eval_rows 6 --max_new_tokens 0 --max_steps 4"
).split()


def launch(*command: str, **variables: str) -> None:
    """Run a command in a process of its own; its processes find the package, and take one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, *command], env=environment | variables, capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, f"{done.stderr[:6000]}\n...\n{done.stderr[-1000:]}"  # the launcher's report ends it


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_configuration_says_how_to_start_it(path):
    from accelerate.commands.config.config_args import load_config_from_file

    comments = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    command = re.search(r"accelerate launch --config_file (\S+)[\s#\\]+(examples/\S+)", comments)
    assert command and ROOT / command[1] == path and (ROOT / command[2]).exists()
    config = load_config_from_file(str(path))  # refuses unknown keys
    sizes = {k.removeprefix("parallelism_config_"): v for k, v in (config.parallelism_config or {}).items()}
    if sizes:
        assert sizes["dp_replicate_size"] * sizes["dp_shard_size"] * sizes["tp_size"] == config.num_processes


@pytest.mark.slow
def test_ddp_equals_one_process_with_the_doubled_batch(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"document {i}: " + "abc def " * 40}) + "\n" for i in range(40)))
    launcher = ["-m", "accelerate.commands.launch", "--config_file"]
    script = [str(ROOT / "examples/finetune_llama.py"), *TINY, "--train_file", str(corpus)]
    results = {}
    for name, rows in (("cpu", "4"), ("cpu_ddp", "2")):
        output = tmp_path / name
        options = ["--batch_size", rows, "--output_dir", str(output)]
        launch(*launcher, str(ROOT / f"configs/accelerate/{name}.yaml"), *script, *options, ACCELERATE_USE_CPU="true")
        results[name] = json.loads((output / "result.json").read_text())
    assert (results["cpu"]["processes"], results["cpu_ddp"]["processes"]) == (1, 2)
    assert results["cpu_ddp"]["engine"] == "MULTI_CPU"
    assert results["cpu_ddp"]["losses"] == pytest.approx(results["cpu"]["losses"], rel=1e-3)
    assert results["cpu_ddp"]["bits_per_byte_end"] == pytest.approx(results["cpu"]["bits_per_byte_end"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine, processes", [("fsdp2", 2), ("tp", 2), ("fsdp2_tp", 4)])
def test_sharded_model_trains_like_a_whole_one(engine, processes, tmp_path):
    """flash_plus under FSDP2 and tensor parallelism, on packed rows, with gradients clipped."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sys.path.insert(0, str(Path(__file__).parent))
    import sharded_worker

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    result = tmp_path / "losses.json"
    worker = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launch(*worker, sharded_worker.__file__, engine, str(tmp_path), str(result))
    losses = json.loads(result.read_text())
    assert losses == pytest.approx(sharded_worker.train("one", str(tmp_path)), rel=1e-5)
    assert abs(losses[-1] - losses[0]) > 0.02


def test_fsdp_is_refused_where_accelerate_would_run_ddp(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "examples"))
    import _common

    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="no FSDP"):
        _common.make_accelerator(_common.TrainArguments(output_dir=str(tmp_path)))
