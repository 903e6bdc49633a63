"""README.md says what the code says: its tables of settings and of paths, its Python snippets, its make targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_flash_plus import dispatch
from hf_flash_plus.providers import PROVIDERS
from hf_flash_plus.settings import SETTINGS, USE_FLAGGEMS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    """The body of the README table between the comments ``<!-- name`` and ``<!-- /name``, cell by cell."""
    between = re.search(rf"<!-- {name}:.*?-->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert between, f"README.md has no table marked {name}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in between[1].strip().splitlines()]
    return rows[2:]


def test_settings_table_is_the_settings():
    expected = [[f"`{s.name}`", s.values, f"`{s.default}`" if s.default else "(empty)", s.meaning] for s in SETTINGS]
    assert table("settings") == expected


def test_paths_table_is_the_paths():
    expected = [
        [f"`{USE_FLAGGEMS}={str(value).upper()}`", ", ".join(f"`{name}`" for name in dispatch.PATHS[value])]
        for value in (True, False)
    ]
    assert table("paths") == expected


def test_every_provider_is_described():
    described = set(re.findall(r"^\| `(\w+)` \| ", README, re.MULTILINE))
    assert {name for order in dispatch.PATHS.values() for name in order} <= described
    assert set(PROVIDERS) <= described


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    lines = re.findall(r"^make ([^#\n]+)", README, re.MULTILINE)
    assert lines
    for line in lines:
        assert set(line.split()) <= targets, line


@pytest.mark.parametrize("snippet", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_snippets_run(snippet: str):
    """With a small model standing in for the one that the first snippet would load."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    load = 'AutoModelForCausalLM.from_pretrained("path/or/name", '
    names = {"model": LlamaForCausalLM(config), "config": config}
    exec(snippet.replace(load, "AutoModelForCausalLM.from_config(config, "), names)
    if load in snippet:
        assert names["model"].config._attn_implementation == "flash_plus"
