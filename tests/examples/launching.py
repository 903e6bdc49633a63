"""Commands that start several processes on the CPU, for tests.

What made such tests fail on busy machines, and what is done about it: fixed ports that another test's processes hold
(free ones are asked for; between asking and binding one can be lost, so a clash is tried once more); as many threads a
process as there are cores (one each); interfaces that gloo finds by the host's name (loopback); processes that leave
the group while others still talk to them (the scripts meet at a barrier first); launchers that outlive their test (the
whole session is killed).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: torchrun, which chooses a free port so.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
_CLASHES = ("EADDRINUSE", "ddress already in use", "already in use")


def launch(*command: str, timeout: float = 240, **variables: str) -> str:
    """Run a command of Python in processes of its own; what it printed. Fails with the end of its errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, *command],
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, errors = process.communicate()
            raise AssertionError(f"no end after {timeout} seconds:\n{errors[-3000:]}") from None
        if process.returncode == 0:
            return printed
        if attempt or not any(words in errors for words in _CLASHES):
            break
    raise AssertionError(f"{errors[:6000]}\n...\n{errors[-1000:]}")  # the launcher's report ends it
