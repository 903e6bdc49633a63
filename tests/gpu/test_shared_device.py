"""Kernels that the device leaves in their midst, for another process: they give what they give alone.

Between processes the device's time is dealt out in slices of about 2 ms; what a kernel has in registers and in shared
memory is saved and brought back. Kernels here run longer than a slice.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.masks import AttentionMask
from hf_flash_plus.providers.triton import TritonProvider

pytestmark = [pytest.mark.gpu, pytest.mark.exclusive]

SECONDS = 1.5
NEIGHBOUR = """
import torch
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
print("ready", flush=True)
while True:
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
"""
#: batch, seqlen_q, seqlen_k, heads, head dim, mask
CASES = [
    (1, 24576, 24576, 8, 128, "full"),
    (1, 32768, 32768, 8, 128, "causal"),
    (1, 49152, 49152, 8, 64, "causal"),
    (1, 49152, 49152, 8, 128, "packed"),
    (2, 3, 5, 40000, 16, "full"),  # many short programs
]
#: Of any order only: repeatable gradients are computed by the portable kernels there.
WIDE_CASES = [(1, 24576, 24576, 8, 256, "causal"), (1, 32768, 32768, 8, 192, "causal")]


def _mask(kind: str, seqlen: int) -> AttentionMask:
    if kind == "packed":  # two documents
        row = torch.arange(seqlen, device="cuda", dtype=torch.int32)
        return AttentionMask(row_intervals=torch.stack((row // (seqlen // 2) * (seqlen // 2), row + 1), -1)[None])
    return AttentionMask(causal=kind == "causal")


@pytest.fixture(scope="module")
def neighbour() -> Iterator[list[subprocess.Popen[str]]]:
    """Starts other processes on the device when a test asks for them by :func:`_beside`."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.wait()


def _beside(running: list[subprocess.Popen[str]]) -> None:
    for _ in range(2 - len(running)):
        running.append(subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout is not None and running[-1].stdout.readline() == "ready\n"
    for process in running:
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("case", "repeatable"),
    [*((case, repeatable) for case in CASES for repeatable in (True, False)), *((case, False) for case in WIDE_CASES)],
    ids=lambda value: ("any-order", "repeatable")[value] if isinstance(value, bool) else "-".join(map(str, value)),
)
def test_same_results(
    case: tuple[int, int, int, int, int, str], repeatable: bool, neighbour: list[subprocess.Popen[str]]
) -> None:
    """The same bits beside other processes as in the first call; dq summed in any order: the same to its last bits."""
    batch, seqlen_q, seqlen_k, heads, dim, kind = case
    torch.manual_seed(0)
    v_dim = 128 if dim == 192 else dim
    q, k, v, dout = (
        torch.randn(batch, n, heads, columns, device="cuda", dtype=torch.bfloat16)
        for n, columns in ((seqlen_q, dim), (seqlen_k, dim), (seqlen_k, v_dim), (seqlen_q, v_dim))
    )
    mask = _mask(kind, seqlen_q)
    inputs = AttentionInputs(q, k, v, dim**-0.5, mask, deterministic=repeatable, needs_lse=True)
    provider = TritonProvider()

    def run() -> list[torch.Tensor]:
        output = provider.forward(inputs)
        grads = provider.backward(inputs, output.out, output.softmax_lse, dout, bias_grad=False, sinks_grad=False)
        return [output.out, output.softmax_lse, grads.dk, grads.dv, grads.dq]

    def differences(found: list[torch.Tensor]) -> list[str]:
        wrong = []
        for name, got, want in zip(("out", "lse", "dk", "dv", "dq"), found, first):
            if name == "dq" and not repeatable:
                bad = ~((got.float() - want.float()).abs() <= 0.02 * want.float().abs().max())
            else:
                bad = (got != want) & ~(got.isnan() & want.isnan())
            if bad.any():
                wrong.append(f"{name}: {int(bad.sum())} numbers, {int(got[bad].isnan().sum())} of them NaN")
        return wrong

    first = run()
    assert not differences(run())
    _beside(neighbour)
    begin, calls = time.monotonic(), 0
    while time.monotonic() - begin < SECONDS:
        calls += 1
        assert not differences(run()), f"call {calls}"
    for process in neighbour:
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)  # the next case's first call is alone again
