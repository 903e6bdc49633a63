"""What goes wrong on GPUs, and that the next call works: memory, compilers, caches, streams, devices, graphs."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import hf_flash_plus as hfp
from hf_flash_plus import AttentionMask, patch_model, unpatch_model, use_provider
from hf_flash_plus.checks import compare, isolate
from hf_flash_plus.checks.compare import CRASH, OK
from hf_flash_plus.providers import PROVIDERS
from tests.gpu import crashing
from tests.transformers.test_parallel import Attended
from tests.transformers.tiny import build, ids

pytestmark = pytest.mark.gpu

ROOT = Path(hfp.__file__).resolve().parent.parent
CAUSAL = AttentionMask(causal=True)


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    reason = PROVIDERS["triton"].unavailable_reason()
    if reason:
        pytest.skip(reason)


def qkv(seqlen: int = 300, seed: int = 0, device: str = "cuda") -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(2, seqlen, 4, 64, device=device).bfloat16().requires_grad_() for _ in range(3)]


def step(leaves: list[Tensor], provider: str = "triton", deterministic: bool = True) -> list[Tensor]:
    """Output and gradients, repeatable to the bit."""
    with use_provider(provider):
        out = hfp.attention(*leaves, CAUSAL, deterministic=deterministic)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Code in a fresh process; variables of value None are taken out of its environment."""
    env = {k: v for k, v in {**os.environ, "PYTHONPATH": str(ROOT), **environment}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)


# --- memory ---


@pytest.mark.exclusive
def test_out_of_memory_in_forward_then_the_next_call_works() -> None:
    expected = step(qkv())
    free, _ = torch.cuda.mem_get_info()
    large = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16).expand(1, free // 64, 1, 64)
    before = torch.cuda.memory_allocated()
    with use_provider("triton"), pytest.raises(torch.OutOfMemoryError):
        hfp.attention(large, large, large, AttentionMask(window=(0, 0)))
    assert torch.cuda.memory_allocated() == before, "nothing is held on to"
    assert all(torch.equal(a, b) for a, b in zip(step(qkv()), expected))


@pytest.mark.exclusive
def test_out_of_memory_in_backward_then_the_next_call_works() -> None:
    leaves = qkv(4096)
    expected = step(leaves)
    with use_provider("triton"):
        out = hfp.attention(*leaves, CAUSAL, deterministic=True)
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(used / torch.cuda.mem_get_info()[1])
    hoard = []
    try:
        for size in (2**24, 2**22, 2**21, 2**20, 2**16, 2**12, 2**9):  # all that is reserved and free
            while True:
                try:
                    hoard.append(torch.empty(size, device="cuda", dtype=torch.uint8))
                except torch.OutOfMemoryError:
                    break
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(out, leaves, out.detach())
    finally:
        hoard.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    del out
    assert all(torch.equal(a, b) for a, b in zip(step(leaves), expected))


# --- a machine without a compiler, with a cache that cannot be written ---

CALL = """
import logging; logging.basicConfig(level=logging.INFO)
import torch, hf_flash_plus
from hf_flash_plus.providers import PROVIDERS
print(PROVIDERS["triton"].unavailable_reason())
q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
hf_flash_plus.flash_attn_func(q, q, q, causal=True).sum().backward()
print(hf_flash_plus.providers_used(), q.grad.isfinite().all().item())
"""


def test_no_compiler(tmp_path: Path) -> None:
    """Torch serves instead, and the log says why; forced, the error says what to do."""
    bare = dict(PATH=str(tmp_path), CC=None, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    done = python(CALL, **bare)
    assert done.returncode == 0, done.stderr
    assert "install gcc or clang, or set CC" in done.stdout and "['torch_sdpa'] True" in done.stdout
    assert "torch_sdpa serves on cuda" in done.stderr and "C compiler" in done.stderr
    done = python(CALL, **bare, HF_FLASH_PLUS_PROVIDER="triton")
    assert done.returncode != 0 and "NoProviderError" in done.stderr and "install gcc or clang" in done.stderr


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A file stands where the folder should be: root, too, cannot write there."""
    (tmp_path / "cache").touch()
    done = python(CALL, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "set TRITON_CACHE_DIR" in done.stdout and "['torch_sdpa'] True" in done.stdout


def test_a_read_only_cache_that_holds_everything(tmp_path: Path) -> None:
    """No compiler in PATH; only the program by which Python, and so Triton's cache, knows the platform."""
    cache, programs = tmp_path / "cache", tmp_path / "bin"
    programs.mkdir()
    here = shutil.which("file")
    if here:
        (programs / "file").symlink_to(here)
    assert python(CALL, TRITON_CACHE_DIR=str(cache)).returncode == 0
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        done = python(CALL, TRITON_CACHE_DIR=str(cache), PATH=str(programs), CC=None)
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("None\n") and "triton" in done.stdout.splitlines()[-1]


# --- several at once ---


def test_two_streams() -> None:
    """Each waits for its own work only, and gets its own result."""
    inputs = [qkv(1024, seed) for seed in (1, 2)]
    expected = [step(leaves) for leaves in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i] = step(inputs[i])
    torch.cuda.synchronize()
    for got, want in zip(results, expected):
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_threads_with_streams_of_their_own() -> None:
    # The generator serves all threads: inputs are drawn before.
    drawn = [qkv(500 + 100 * i, seed=i) for i in range(3)]
    wanted = [step(leaves) for leaves in drawn]
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    got = step(drawn[i])
                torch.cuda.current_stream().synchronize()
            assert all(torch.equal(a, b) for a, b in zip(got, wanted[i]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors and not any(thread.is_alive() for thread in threads)


@pytest.mark.exclusive  # the other processes would each take memory for a context on every device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("provider", ["triton", "flaggems", "torch_sdpa"])
def test_every_device(provider: str) -> None:
    """Training on a device that is not the current one, with the results of the current one."""
    if PROVIDERS[provider].unavailable_reason():
        pytest.skip("cannot be used")
    ordered = provider != "torch_sdpa"  # torch's own adds gradients in any order
    expected = [t.cpu() for t in step(qkv(), provider, ordered)]
    for index in range(1, torch.cuda.device_count()):
        leaves = [t.detach().to(f"cuda:{index}").requires_grad_() for t in qkv()]
        got = step(leaves, provider, ordered)
        assert torch.cuda.current_device() == 0
        assert all(t.device.index == index for t in got)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a.cpu(), b, **({"atol": 0, "rtol": 0} if ordered else {}))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_beside_a_gpu(method: str) -> None:
    """Workers compute attention on the CPU while their parent, forked after its first kernel, goes on with the GPU."""
    expected = step(qkv())
    model = build("llama")
    patch_model(model)
    dataset = Attended(model)
    wanted = [dataset[i] for i in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=1, num_workers=1, multiprocessing_context=method, timeout=120)
    for got, want in zip(loader, wanted, strict=True):
        torch.testing.assert_close(got[0], want, atol=1e-6, rtol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(step(qkv()), expected))


def test_copies_of_a_patched_model() -> None:
    model = build("llama").cuda().bfloat16()
    patch_model(model)
    with torch.no_grad():
        expected = model(input_ids=ids().cuda()).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.config._attn_implementation == "flash_plus"
            assert torch.equal(twin(input_ids=ids().cuda()).logits, expected)
            unpatch_model(twin)
            assert twin.config._attn_implementation == "eager"
        assert model.config._attn_implementation == "flash_plus"


# --- graphs and modes ---


@pytest.mark.parametrize("kind", ["causal", "intervals", "cache"])
def test_a_graph_replayed_with_changed_inputs(kind: str) -> None:
    """Inputs, masks and lengths are data of a graph: a replay follows them."""
    q, k, v = (t.detach() for t in qkv(200))
    one = q[:, :1].contiguous()
    lengths = torch.tensor([5, 100], dtype=torch.int32, device="cuda")
    intervals = torch.stack(torch.broadcast_tensors(torch.tensor(0), torch.arange(1, 201)), -1)[None].int().cuda()

    def call() -> Tensor:
        with use_provider("triton"):
            if kind == "cache":
                out: Tensor = hfp.flash_attn_with_kvcache(one, k, v, cache_seqlens=lengths)
                return out
            mask = CAUSAL if kind == "causal" else AttentionMask(row_intervals=intervals)
            result: Tensor = hfp.attention(q, k, v, mask)
            return result

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for seed in range(3):
        torch.manual_seed(seed)
        for tensor in (q, k, v, one):
            tensor.normal_()
        lengths.copy_(torch.randint(1, 200, (2,)))
        intervals[..., 0].copy_(torch.randint(0, 100, (200,)))
        graph.replay()
        torch.testing.assert_close(result, call(), atol=0, rtol=0)


def test_inference_mode() -> None:
    leaves = qkv()
    expected = step(leaves)[0]
    with torch.inference_mode(), use_provider("triton"):
        assert torch.equal(hfp.attention(*leaves, CAUSAL), expected)
    assert torch.equal(step(leaves)[0], expected)


# --- crashes ---


def test_an_illegal_access_is_a_row_and_the_next_process_goes_on() -> None:
    cells = [isolate.Cell("triton", name, "bf16", "cuda") for name in ("fine", "device assert", "fine too")]
    rows = list(isolate.run_apart(crashing.run, cells, timeout=60.0))
    assert [row.status for row in rows] == [OK, CRASH, OK], rows
    assert rows[1].note.endswith(isolate.LOST)
    assert compare.run_cell("triton", "full", "bf16", "cuda").status == OK, "this process never noticed"


@pytest.mark.exclusive
def test_check_passes_here(tmp_path: Path) -> None:
    """The whole command, with everything that can serve; HF_FLASH_PLUS_CHECK_JSON says where the result is kept."""
    path = os.environ.get("HF_FLASH_PLUS_CHECK_JSON", str(tmp_path / "check.json"))
    command = [sys.executable, "-m", "hf_flash_plus", "check", "--device", "cuda", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
