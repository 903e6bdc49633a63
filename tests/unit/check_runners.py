"""Cells that end badly, for the tests of ``checks.isolate``: importable, so that spawned processes find them."""

from __future__ import annotations

import multiprocessing.util
import os
import signal
import sys
import time
from pathlib import Path

from hf_flash_plus.checks.compare import OK, Row


def misbehave(provider: str, feature: str, dtype: str, device: str) -> Row:
    """Do what the feature's name says."""
    if feature == "abort":
        os.kill(os.getpid(), signal.SIGABRT)
    if feature == "exit":
        os._exit(3)
    if feature == "hang":
        time.sleep(600)
    print("torn table")  # must not reach the parent's output
    return Row(provider, feature, dtype, OK, error=0.5)


def surroundings(provider: str, feature: str, dtype: str, device: str) -> Row:
    """The environment variable that the feature names, and what was imported before the cell came, as the note."""
    return Row(provider, feature, dtype, OK, note=f"{os.environ.get(feature)} {'torch' in _AT_FIRST}")


def tidies_up(provider: str, feature: str, dtype: str, device: str) -> Row:
    """At the end of the process, a file of the feature's name."""
    multiprocessing.util.Finalize(None, Path(feature).touch, exitpriority=1)
    return Row(provider, feature, dtype, OK)


_AT_FIRST = frozenset(sys.modules)
