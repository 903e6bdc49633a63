"""What Triton needs on a machine besides a GPU: a C compiler and a folder for what it compiled.

Asked before the first call: what Triton itself says when one of them is missing comes out of the middle of a forward
pass, where another provider could have served.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

COMPILERS = ("gcc", "clang")


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels (``TRITON_CACHE_DIR``, ``TRITON_HOME``)."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("TRITON_HOME")
    return (Path(home).expanduser() if home else Path.home()) / ".triton" / "cache"


def missing_tool() -> str | None:
    """Why Triton cannot compile here, and what to do; None where it can, or where kernels lie ready in its cache."""
    try:
        folder = cache_folder()
        if folder.is_dir() and next(folder.iterdir(), None) is not None:
            return None  # an image may hold everything compiled, read-only, and no compiler
    except (OSError, RuntimeError) as error:  # no permission to look, or no home folder
        return f"Triton's cache cannot be read ({error}); set TRITON_CACHE_DIR to a folder that can be written"
    compiler = os.environ.get("CC")
    if compiler is None and not any(map(shutil.which, COMPILERS)):
        return "Triton needs a C compiler, and finds none: install gcc or clang, or set CC to one"
    if compiler is not None and compiler.split() and shutil.which(compiler.split()[0]) is None:
        return f"Triton needs a C compiler, and CC={compiler} is not there: set CC to one, or unset it"
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"Triton's cache {folder} cannot be written: set TRITON_CACHE_DIR to a folder that can"
    return None
