"""Two and four CPU processes (gloo): the losses are those of one process on the whole batch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launching import ROOT, TORCHRUN, launch

pytestmark = pytest.mark.distributed

CONFIGURATIONS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


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
@pytest.mark.parametrize("engine, processes", [("fsdp2", 2), ("tp", 2), ("fsdp2_tp", 4)])
def test_sharded_model_trains_like_a_whole_one(engine, processes, tmp_path):
    """flash_plus under FSDP2 and tensor parallelism, on packed rows, with gradients clipped."""
    import sharded_worker
    from transformers import AutoModelForCausalLM, LlamaConfig

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
    launch(*TORCHRUN, "--nproc_per_node", str(processes), sharded_worker.__file__, engine, str(tmp_path), str(result))
    losses = json.loads(result.read_text())
    assert losses == pytest.approx(sharded_worker.train("one", str(tmp_path)), rel=1e-5)
    assert abs(losses[-1] - losses[0]) > 0.02


@pytest.mark.slow
def test_ulysses_computes_packed_rows_as_one_process_does():
    """DeepSpeed hands attention no mask there: only position_ids tell the documents of a row apart."""
    pytest.importorskip("deepspeed")
    launch(*TORCHRUN, "--nproc_per_node", "2", str(Path(__file__).with_name("ulysses_worker.py")))


def test_fsdp_is_refused_where_accelerate_would_run_ddp(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "examples"))
    import common

    if torch.accelerator.is_available():
        pytest.skip("needs a machine without an accelerator")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit, match="no FSDP"):
        common.make_accelerator(common.TrainArguments(output_dir=str(tmp_path)))
