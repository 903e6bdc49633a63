"""Standing in for the ``flash_attn`` package."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_flash_plus as hfp
from hf_flash_plus import bert_padding, install_as_flash_attn, uninstall_as_flash_attn

NAMES = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _modules() -> dict[str, object]:
    return {n: m for n, m in sys.modules.items() if n == "flash_attn" or n.startswith("flash_attn.")}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("a real flash_attn is installed here")
    yield
    uninstall_as_flash_attn()
    for name in _modules():
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A "real" flash_attn on sys.path."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '9.9'\ndef flash_attn_func(): return 'real'\n")
    (package / "layers.py").write_text("rotary = 'real'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return str(package)


def test_imports_resolve_to_ours() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")
    install_as_flash_attn()
    package = importlib.import_module("flash_attn")
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    for name in NAMES:
        assert getattr(package, name) is getattr(interface, name) is getattr(hfp, name)
    assert package.__version__.startswith("2.8.3")
    padding = importlib.import_module("flash_attn.bert_padding")
    for name in ("unpad_input", "pad_input", "index_first_axis"):
        assert getattr(padding, name) is getattr(bert_padding, name)
    assert package.bert_padding is padding and package.flash_attn_interface is interface


def test_from_imports_as_people_write_them() -> None:
    install_as_flash_attn()
    namespace: dict[str, object] = {}
    exec(
        "import flash_attn\n"
        "from flash_attn import flash_attn_func, flash_attn_varlen_func\n"
        "from flash_attn.flash_attn_interface import flash_attn_with_kvcache\n"
        "from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input\n"
        "import flash_attn.bert_padding as padding\n",
        namespace,
    )
    assert namespace["flash_attn_func"] is hfp.flash_attn_func
    q = torch.randn(1, 3, 2, 8)
    assert namespace["flash_attn"].flash_attn_func(q, q, q).shape == q.shape  # type: ignore[attr-defined]


def test_find_spec_works() -> None:
    install_as_flash_attn()
    for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"):
        assert importlib.util.find_spec(name) is not None
    assert importlib.util.find_spec("flash_attn.layers") is None


def test_what_it_does_not_have_is_an_import_error() -> None:
    install_as_flash_attn()
    with pytest.raises(ImportError, match="no_such_function"):
        exec("from flash_attn import no_such_function")
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.layers"):
        importlib.import_module("flash_attn.layers.rotary")


def test_install_twice_and_uninstall() -> None:
    before = _modules()
    install_as_flash_attn()
    first = _modules()
    assert set(first) == {"flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding"}
    install_as_flash_attn()
    assert _modules() == first
    uninstall_as_flash_attn()
    assert _modules() == before
    assert importlib.util.find_spec("flash_attn") is None
    uninstall_as_flash_attn()  # nothing to undo
    assert sys.modules["hf_flash_plus.bert_padding"] is bert_padding


@pytest.mark.parametrize("imported", [False, True])
def test_refuses_to_hide_a_real_package(real: str, imported: bool) -> None:
    if imported:
        importlib.import_module("flash_attn")
    before = _modules()
    with pytest.raises(ImportError, match=r"replace_real=True"):
        install_as_flash_attn()
    assert _modules() == before
    package = importlib.import_module("flash_attn")
    assert package.flash_attn_func() == "real"


@pytest.mark.parametrize("imported", [False, True])
def test_replaces_a_real_package_when_told_and_gives_it_back(real: str, imported: bool) -> None:
    if imported:
        importlib.import_module("flash_attn.layers")
    before = _modules()
    install_as_flash_attn(replace_real=True)
    assert importlib.import_module("flash_attn").flash_attn_func is hfp.flash_attn_func
    assert "flash_attn.layers" not in sys.modules, "half of the real package must not shine through"
    uninstall_as_flash_attn()
    assert _modules() == before
    assert importlib.import_module("flash_attn").flash_attn_func() == "real"
    assert importlib.import_module("flash_attn.layers").rotary == "real"


def test_uninstall_leaves_a_real_package_alone(real: str) -> None:
    importlib.import_module("flash_attn.layers")
    before = _modules()
    uninstall_as_flash_attn()
    assert _modules() == before


def test_a_blocked_flash_attn_is_no_real_one() -> None:
    sys.modules["flash_attn"] = None  # type: ignore[assignment]  # how tests and libraries forbid an import
    install_as_flash_attn()
    assert importlib.import_module("flash_attn").flash_attn_func is hfp.flash_attn_func
    uninstall_as_flash_attn()
    assert sys.modules["flash_attn"] is None


def test_transformers_does_not_take_it_for_flash_attention_2(monkeypatch: pytest.MonkeyPatch) -> None:
    import_utils = pytest.importorskip("transformers.utils.import_utils")
    # Transformers asks for a device first; pretend there is one, so that the answer is about the package.
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    checks = [getattr(import_utils, name) for name in dir(import_utils) if name.startswith("is_flash_attn_")]
    checks = [check for check in checks if hasattr(check, "cache_clear")]
    assert checks

    def answers() -> list[bool]:
        for name in dir(import_utils):
            if hasattr(getattr(import_utils, name), "cache_clear"):
                getattr(import_utils, name).cache_clear()
        return [bool(check()) for check in checks if "greater" not in check.__name__]

    try:
        before = answers()
        assert not any(before)
        install_as_flash_attn()
        assert answers() == before
    finally:
        uninstall_as_flash_attn()
        monkeypatch.undo()
        answers()


def test_our_own_flash_attn_provider_does_not_take_it_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_flash_plus.providers import flash_attn as provider

    install_as_flash_attn()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    provider._find.cache_clear()
    try:
        found = provider._find()
        assert isinstance(found, str) and "flash-attn is not installed" in found
    finally:
        provider._find.cache_clear()


def test_before_transformers_is_imported_at_all() -> None:
    # In a process of its own: Transformers' lazy modules look for flash_attn while they are imported.
    code = (
        "import sys; sys.modules['flash_attn'] = None; del sys.modules['flash_attn']\n"
        "import hf_flash_plus; hf_flash_plus.install_as_flash_attn()\n"
        "from transformers.utils import is_flash_attn_2_available\n"
        "import transformers.models.llama.modeling_llama, transformers.modeling_flash_attention_utils\n"
        "assert not is_flash_attn_2_available()\n"
        "from flash_attn import flash_attn_func\n"
        "assert flash_attn_func is hf_flash_plus.flash_attn_func\n"
    )
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
