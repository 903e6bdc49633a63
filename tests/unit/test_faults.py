"""Machines that are not as they should be: packages broken, foreign or old, no compiler, no writable cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hf_flash_plus.providers import flash_attn, toolchain, triton


def package(folder: Path, module: str, distribution: str, version: str, body: str) -> None:
    """An installed package, as files."""
    parts = module.split(".")
    where = folder.joinpath(*parts)
    where.mkdir(parents=True)
    for i in range(1, len(parts)):
        (folder.joinpath(*parts[:i]) / "__init__.py").touch()
    (where / "__init__.py").write_text(body)
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched for packages first, on a machine that says it has an H100."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return tmp_path


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a fake package left behind must not reach the next test."""
    before = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("flash_attn", "triton")
    }
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "triton")]:
        if name not in before:
            del sys.modules[name]


FLASH_2 = """
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False): ...
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None): ...
"""
# flash-attn 1 had neither windows nor softcap, and this signature.
FLASH_1 = """
def flash_attn_func(qkv, cu_seqlens, dropout_p, max_s, softmax_scale=None, causal=False, return_attn_probs=False): ...
flash_attn_varlen_func = flash_attn_func
"""


@pytest.mark.parametrize(
    "version, body, says",
    [
        ("2.8.3", FLASH_2, ""),
        ("2.9.0", "def flash_attn_func(*args, **kwargs): ...\nflash_attn_varlen_func = flash_attn_func", ""),
        ("1.0.9", FLASH_1, "flash-attn 1.0.9 has an interface that is not known here (flash_attn_func takes no"),
        ("9.0", FLASH_2.replace("softcap=0.0,", ""), "flash_attn_func takes no softcap"),
        ("2.8.3", "def flash_attn_func(q, k, v): ...", "flash_attn_func takes no alibi_slopes, causal"),
        ("2.8.3", FLASH_2.split("def flash_attn_varlen")[0], "flash_attn has no flash_attn_varlen_func"),
        ("2.8.3", "raise ImportError('undefined symbol: _ZN3c104cuda')", "ImportError: undefined symbol"),
        ("2.8.3", "raise OSError('libcudart.so.11: cannot open')", "OSError: libcudart.so.11"),
    ],
    ids=["known", "takes anything", "1.0.9", "9.0", "other", "half", "another torch", "another CUDA"],
)
def test_flash_attn(fresh: Path, version: str, body: str, says: str) -> None:
    package(fresh, "flash_attn", "flash-attn", version, body)
    found = flash_attn._find.__wrapped__()
    if says:
        assert isinstance(found, str) and says in found, found
    else:
        assert not isinstance(found, str) and (found[0].number, found[2]) == (2, version)


@pytest.mark.parametrize(
    "version, body, says",
    [
        ("3.5.1", "__version__ = '3.5.1'", "triton 3.5.1 is too old, 3.6 is the oldest supported"),
        ("x", "__version__ = 'unknown'", "its version is 'unknown'"),
        ("3.6.0", "", "its version is None"),
        ("3.6.0", "raise ImportError('libtriton.so: GLIBC_2.34 not found')", "ImportError: libtriton.so: GLIBC_2.34"),
        ("3.6.0", "raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers"),
        ("3.6.0", "raise KeyError('HOME')", "KeyError: 'HOME'"),
    ],
    ids=["old", "unknown", "no version", "another libc", "no driver", "anything"],
)
def test_triton(fresh: Path, version: str, body: str, says: str) -> None:
    package(fresh, "triton", "triton", version, body)
    reason = triton._import_error.__wrapped__()
    assert reason is not None and says in reason


def test_every_installed_triton_that_is_supported_is_accepted() -> None:
    pytest.importorskip("triton")
    assert triton._import_error.__wrapped__() is None


# --- what Triton needs besides a GPU ---


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without compilers, settings or kernels; returns the folder of its programs."""
    for name in ("CC", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "bin"


def program(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_a_compiler_is_looked_for(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "install gcc or clang, or set CC" in str(toolchain.missing_tool())
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "CC=/nowhere/cc is not there" in str(toolchain.missing_tool())
    monkeypatch.setenv("CC", f"{program(bare, 'my-cc')} -m64")
    assert toolchain.missing_tool() is None
    monkeypatch.delenv("CC")
    for name in toolchain.COMPILERS:
        path = program(bare, name)
        assert toolchain.missing_tool() is None
        path.unlink()


def test_kernels_that_lie_ready_need_no_compiler(bare: Path) -> None:
    folder = Path(os.environ["HOME"]) / ".triton" / "cache"
    assert toolchain.cache_folder() == folder
    (folder / "ABC").mkdir(parents=True)
    assert toolchain.missing_tool() is None


def test_a_cache_that_cannot_be_written(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(bare, "gcc")
    folder = bare.parent / "read-only"
    folder.mkdir()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "deep" / "cache"))
    assert toolchain.missing_tool() is None
    # Not by chmod: root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
    reason = str(toolchain.missing_tool())
    assert str(folder / "deep" / "cache") in reason and "set TRITON_CACHE_DIR" in reason
    (folder / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "file"))
    assert "cannot be" in str(toolchain.missing_tool()), "a file stands where the folder should be"


def test_triton_home(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_HOME", str(bare.parent))
    assert toolchain.cache_folder() == bare.parent / ".triton" / "cache"


def test_the_providers_ask(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled, so that another provider serves."""
    monkeypatch.setattr(triton, "_import_error", lambda: None)
    monkeypatch.setattr(triton, "_accelerator", lambda: True)
    monkeypatch.setattr(triton, "_interpreting", lambda: False)
    assert "install gcc" in str(triton.TritonProvider().unavailable_reason())
    monkeypatch.setattr(triton, "_interpreting", lambda: True)
    assert triton.TritonProvider().unavailable_reason() is None, "the interpreter compiles nothing"
