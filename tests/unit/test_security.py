"""The promises of SECURITY.md: no code or data fetched, no pickle, no writes, no shell."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_flash_plus

ROOT = Path(hf_flash_plus.__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "hf_flash_plus").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "urllib3"}
UNPICKLING = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
SHELLS = {"system", "popen", "spawnl", "spawnlp", "spawnv", "execv", "execvp", "getoutput", "getstatusoutput"}


#: Who starts programs, from lists of arguments: git and nvidia-smi; Triton's disassembler; the example scripts, side by
#: side.
STARTERS = ("hf_flash_plus/bench/environment.py", "hf_flash_plus/kernels/machine_code.py", "examples/common/jobs.py")


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in SOURCES:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """``("torch.load", call)`` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_something_to_look_at() -> None:
    assert len(SOURCES) > 60 and any(path.name == "finetune_llama.py" for path in SOURCES)


def test_no_network_no_pickle_no_shell_in_the_sources() -> None:
    for name, tree in trees():
        found = imports(tree)
        assert not found & NETWORK, f"{name} imports {found & NETWORK}"
        assert not found & UNPICKLING, f"{name} imports {found & UNPICKLING}"
        assert "subprocess" not in found or name in STARTERS, name
        for function, call in calls(tree):
            last = function.rpartition(".")[2]
            assert function not in ("torch.load", "torch.save", "eval", "exec", "compile", "__import__"), (
                name,
                function,
            )
            assert not (function.startswith("os.") and last in SHELLS), (name, function)
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            assert "shell" not in keywords, (name, function)
            assert "trust_remote_code" not in keywords, (name, function)
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "trust_remote_code" not in text and "allow_pickle" not in text, name


#: Import, patch, train, generate and the tools' data, under an audit hook: no file written, no connection, no process.
WATCHED = """
import os, sys, tempfile
sys.dont_write_bytecode = True
import torch, transformers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
import torch._dynamo, multiprocessing  # what others do at import is not looked at
transformers.utils.logging.set_verbosity_error()
small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
models = [LlamaForCausalLM(LlamaConfig(**small)), BertForMaskedLM(BertConfig(**small))]
models[0].generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=1)  # generation's own imports
seen, watching = [], True
def hook(event, args):
    if not watching: return
    if event == "open":
        path, mode, flags = args
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        if writes and path != os.devnull: seen.append(f"open {path} {mode} {flags}")
    elif event.startswith(("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.", "http.", "ftplib.",
                           "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
                           "os.mkdir", "os.remove", "os.rename", "os.chmod", "os.symlink", "os.link", "shutil.",
                           "pickle.", "marshal.load", "code.__new__")):
        # Importing runs marshal on cached bytecode; that is Python's own.
        if event == "marshal.loads" and any("importlib" in f for f in frames()): return
        if event == "code.__new__": return
        seen.append(f"{event} {args!r:.200}")
def frames():
    frame = sys._getframe(2)
    while frame:
        yield frame.f_code.co_filename
        frame = frame.f_back
sys.addaudithook(hook)
import hf_flash_plus
for path in ("TRUE", "FALSE"):
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = path
    for model in models:
        hf_flash_plus.patch_model(model)
        model(input_ids=torch.randint(1, 32, (2, 7)), attention_mask=torch.ones(2, 7)).logits.sum().backward()
        if hasattr(model, "lm_head"):
            model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
        hf_flash_plus.unpatch_model(model)
q = torch.randn(1, 4, 2, 8)
hf_flash_plus.flash_attn_func(q, q, q, causal=True)
hf_flash_plus.flash_attn_with_kvcache(q, q.clone(), q.clone(), q, q, cache_seqlens=0)
hf_flash_plus.install_as_flash_attn()
from hf_flash_plus.providers import PROVIDERS
reasons = [provider.unavailable_reason() for provider in PROVIDERS.values()]
watching = False
import json; print(json.dumps(seen))
"""


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_written_fetched_or_started() -> None:
    assert json.loads(python(WATCHED).splitlines()[-1]) == []


def test_the_watch_sees(tmp_path: Path) -> None:
    """The hook of the test above, with things to see."""
    bad = f"open({str(tmp_path / 'x')!r}, 'w').close()\nos.mkdir({str(tmp_path / 'd')!r})\n"
    bad += "import subprocess; subprocess.run(['true'])\nimport pickle; pickle.loads(pickle.dumps(os.getcwd))\n"
    start, end = WATCHED.index("import torch, transformers"), WATCHED.index("seen, watching")
    lean = WATCHED[:start] + WATCHED[end : WATCHED.index("import hf_flash_plus")] + bad
    lean += WATCHED[WATCHED.index("watching = False") :]
    seen = " ".join(json.loads(python(lean).splitlines()[-1]))
    assert all(word in seen for word in ("open ", "os.mkdir", "subprocess.Popen", "pickle.find_class"))


def test_a_model_that_brings_code_is_not_run(tmp_path: Path) -> None:
    """``from_pretrained`` with our attention asks for nothing that Transformers does not allow by default."""
    from transformers import AutoModelForCausalLM

    config = {"model_type": "brings_code", "auto_map": {name: f"evil.{name[4:]}" for name in
              ("AutoConfig", "AutoModelForCausalLM")}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: ...\n")
    with pytest.raises(Exception, match=r"trust_remote_code|brings_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_plus")
    assert not (tmp_path / "ran").exists()


def test_saved_models_hold_no_pickle(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_flash_plus import patch_model

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    patch_model(model)
    model.save_pretrained(tmp_path)
    names = {path.suffix for path in tmp_path.iterdir()}
    assert ".safetensors" in names and not names & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    assert "flash_plus" not in (tmp_path / "config.json").read_text(), "others can load it without this package"


def test_every_promise_of_the_page_is_tested_here() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "tests/unit/test_security.py" in page
    rows = [line for line in page.splitlines() if line.startswith("| It ")]
    assert len(rows) == 6
