"""Where something was measured: versions, devices, commit, date. For ``info``, ``bench`` and test records."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

#: Installed packages reported by name.
PACKAGES = (
    "torch",
    "triton",
    "flag_gems",
    "transformers",
    "accelerate",
    "flash-attn-4",
    "flash-attn-3",
    "flash-attn",
    "numpy",
)


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except Exception:  # not installed, or a damaged installation
        return None


def versions() -> dict[str, str | None]:
    """Versions of hf_flash_plus, Python and :data:`PACKAGES`; None where not installed. Imports only torch."""
    import torch

    from .. import __version__

    found: dict[str, str | None] = {"hf_flash_plus": __version__, "python": platform.python_version()}
    found |= {name: _package_version(name) for name in PACKAGES}
    found["torch"] = str(torch.__version__)
    found["cuda"] = torch.version.cuda or (f"hip {torch.version.hip}" if torch.version.hip else None)
    return found


def devices() -> list[dict[str, Any]]:
    """The CPU and every GPU torch sees: ``device``, ``name``, ``capability``, ``memory_gib``."""
    import torch

    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "capability": None, "memory_gib": None}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": properties.total_memory / 2**30,
            }
        )
    return found


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, cwd=cwd)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def driver_version() -> str | None:
    """The NVIDIA driver's version, where nvidia-smi is there to tell."""
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, ``-dirty`` where files differ; None outside of git.

    ``HF_FLASH_PLUS_COMMIT`` says it on a machine that has the files but not the repository.
    """
    return os.environ.get("HF_FLASH_PLUS_COMMIT") or _output(
        "git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", cwd=Path(__file__).parent
    )


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def describe() -> dict[str, Any]:
    """All of the above, for a JSON result."""
    found = devices()
    return {
        "date": now(),
        "gpu": next((device["name"] for device in found if device["device"].startswith("cuda")), None),
        "driver": driver_version(),
        "commit": git_commit(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": found,
    }
