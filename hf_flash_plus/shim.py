"""Standing in for the ``flash_attn`` package, so that code written for it runs unchanged."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

#: The flash-attn release whose interface we follow, and what marks the stand-in.
_VERSION = "2.8.3+hf.flash.plus"
_MARK = "__hf_flash_plus__"


def install_as_flash_attn(replace_real: bool = False) -> None:
    """Make ``from flash_attn import flash_attn_func`` (and ``flash_attn.bert_padding``) resolve to hf_flash_plus.

    Args:
        replace_real: also stand in where a real ``flash_attn`` package is installed or imported.

    Raises:
        ImportError: a real ``flash_attn`` is there and ``replace_real`` is False.
    """
    from . import bert_padding, interface, kvcache

    present = sys.modules.get("flash_attn")
    if present is not None and hasattr(present, _MARK):
        return
    if not replace_real and (present is not None or importlib.util.find_spec("flash_attn") is not None):
        raise ImportError(
            "a real flash_attn package is installed; hf_flash_plus will not hide it. "
            "Pass install_as_flash_attn(replace_real=True) to replace it in this process."
        )
    functions = {name: getattr(interface, name) for name in dir(interface) if name.startswith("flash_attn_")}
    functions["flash_attn_with_kvcache"] = kvcache.flash_attn_with_kvcache
    package = _module("flash_attn", functions, package=True)
    submodules = {
        "flash_attn_interface": _module("flash_attn.flash_attn_interface", functions),
        "bert_padding": bert_padding,
    }
    for name in [n for n in sys.modules if n == "flash_attn" or n.startswith("flash_attn.")]:
        _hidden[name] = sys.modules.pop(name)
    sys.modules["flash_attn"] = package
    for name, module in submodules.items():
        setattr(package, name, module)
        sys.modules[f"flash_attn.{name}"] = module


def uninstall_as_flash_attn() -> None:
    """Undo :func:`install_as_flash_attn`."""
    if not hasattr(sys.modules.get("flash_attn"), _MARK):
        return
    for name in [n for n in sys.modules if n == "flash_attn" or n.startswith("flash_attn.")]:
        del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()


_hidden: dict[str, types.ModuleType] = {}


def _module(name: str, members: dict[str, object], package: bool = False) -> types.ModuleType:
    module = types.ModuleType(name, "A stand-in for flash-attn, served by hf_flash_plus.")
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=package)
    if package:
        module.__path__ = []
    module.__version__ = _VERSION  # type: ignore[attr-defined]
    setattr(module, _MARK, True)
    module.__dict__.update(members)
    return module
