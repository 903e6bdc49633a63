"""Tickets of decoding steps: what they launch, and all that must make them step aside."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_flash_plus import settings
from hf_flash_plus.integration import carrier, decoding
from hf_flash_plus.integration.attention import flash_plus_attention
from hf_flash_plus.kernels import decode_step, launch, tiles
from hf_flash_plus.masks import CAUSAL, AttentionMask

SEQLEN_K = 40


class Layer(torch.nn.Module):
    is_causal = True


class Compiled:
    """Stands in for Triton's compiled kernel: counts launches and keeps what the last was launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.watched = 0

    @property
    def run(self) -> Any:
        return lambda *arguments: self.launches.append(arguments)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any) -> None:
            self.watched += 1

        return launch


class Device:
    """The state of the device that a ticket asks for."""

    index, stream, capturing = 0, 7, False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    state = Device()
    for module in (launch, decode_step):
        monkeypatch.setattr(module, "raw_stream", lambda _device: state.stream)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state.index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: state.capturing, raising=False)
    return state


def _tensors(seqlen_k: int = SEQLEN_K, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, heads, rows, 16, dtype=dtype) for heads, rows in ((4, 1), (2, seqlen_k), (2, seqlen_k)))


def _carrier(mask: AttentionMask = CAUSAL) -> torch.Tensor:
    return carrier.attach(torch.zeros(1, 1, 1, 2, dtype=torch.int32), carrier.Carried(mask))


def _ticket(mask: torch.Tensor, tensors: tuple[torch.Tensor, ...], device: Device) -> Compiled:
    """A ticket as the first layer of a token leaves it; the device is called 0, though the tensors are on the CPU."""
    query, key, value = tensors
    compiled = Compiled()
    plan = object.__new__(launch.Plan)
    plan.reusable, plan.constexprs, plan.tile = True, ("constexpr",), tiles.Tile(16, 32, 4, 1)
    plan.compiled = {}
    out = torch.empty(2, 1, 4, 16, dtype=query.dtype)
    built = launch.Launch(plan, 4, (query, key, value, out, None, mask, 1, 2.0), 6, (0, 1))
    plan.remember(built.key, compiled)
    ticket = decode_step.Ticket.of(built, out, None)
    assert ticket is not None
    getattr(mask, carrier.ATTRIBUTE)[0].tickets[decoding._signature(query, key, value, 0.25, None)] = ticket
    return compiled


def _call(mask: torch.Tensor, tensors: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return flash_plus_attention(Layer(), *tensors, mask, **{"scaling": 0.25, **options})[0]


def test_launches_with_the_new_addresses(device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    query, key, value = fresh = _tensors()
    out = _call(mask, fresh)
    assert out.shape == (2, 1, 4, 16) and out.is_contiguous()
    pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr(), None, mask.data_ptr())
    assert compiled.launches == [(4, 1, 1, 7, "function", "metadata", None, None, None, *pointers, 1, 2.0, "constexpr")]
    assert _call(mask, fresh).data_ptr() != out.data_ptr(), "every call has an output of its own"


def _longer(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return _tensors(SEQLEN_K + 1)


def _half(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.bfloat16() for t in tensors)


def _other_strides(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tensors[0], tensors[1].transpose(1, 2).contiguous().transpose(1, 2), tensors[2]


def _misaligned(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    key = torch.empty(tensors[1].numel() + 1)[1:].view(tensors[1].shape)
    return tensors[0], key, tensors[2]


def _subclass(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.nn.Parameter(tensors[0], requires_grad=False), *tensors[1:]


@pytest.mark.parametrize("change", [_longer, _half, _other_strides, _misaligned, _subclass])
def test_not_for_other_tensors(change: Any, device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    other = change(tensors)
    _call(mask, other)
    assert compiled.launches == []
    _call(mask, tensors)
    assert len(compiled.launches) == 1, "the ticket itself is good"


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.5},
        {"softcap": 3.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 1, SEQLEN_K)},
        {"output_attentions": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_not_for_other_calls(options: dict[str, Any], device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    _call(mask, tensors, **options)
    assert compiled.launches == []


def test_not_for_lengths_of_another_batch(device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    with pytest.raises(ValueError, match="describes one flattened row, but the batch is"):
        _call(mask, tensors, cu_seq_lens_q=torch.tensor([0, 1], dtype=torch.int32))
    assert compiled.launches == []


@pytest.mark.parametrize("name,value", [("index", 1), ("stream", 8), ("capturing", True)])
def test_not_on_another_device_or_stream(name: str, value: Any, device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    setattr(device, name, value)
    _call(mask, tensors)
    assert compiled.launches == []


def test_not_where_somebody_watches(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton import knobs

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    mask, tensors = _carrier(), _tensors()
    compiled = _ticket(mask, tensors, device)
    with Mode():
        _call(mask, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _call(mask, tensors)
    flash_plus_attention(Layer(), *tensors, mask, scaling=0.25)  # gradients are enabled
    with settings.provider_override("torch_sdpa"):
        _call(mask, tensors)
    with monkeypatch.context() as patch:
        patch.setenv(settings.USE_FLAGGEMS, "FALSE")
        _call(mask, tensors)
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "launch_enter_hook", lambda _metadata: None)
        _call(mask, tensors)
    logger = logging.getLogger("hf_flash_plus")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        _call(mask, tensors)
    finally:
        logger.setLevel(before)
    assert compiled.launches == []
    _call(mask, tensors)
    assert len(compiled.launches) == 1, "the ticket itself is good"


def test_a_changed_mask_is_an_error(device: Device) -> None:
    mask, tensors = _carrier(), _tensors()
    _ticket(mask, tensors, device)
    mask += 1
    with pytest.raises(ValueError, match="changed in place"):
        _call(mask, tensors)


def test_the_launcher_of_triton_3_6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called without its wrapper, unless the kernel needs scratch memory that the wrapper finds."""

    class Run:
        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid, launch_pdl = "cooperative", "pdl"

        def launch(self) -> None: ...

    compiled = type("Compiled", (), {"run": Run(), "function": "function", "packed_metadata": "metadata"})()
    assert launch.starter(compiled, 4, 7) == (
        compiled.run,
        (4, 1, 1, 7, "function", "metadata", None, None, None),
    )
    monkeypatch.setattr(launch, "_KNOWN_LAUNCHER", True)
    assert launch.starter(compiled, 4, 7) == (
        compiled.run.launch,
        (4, 1, 1, 7, "function", "cooperative", "pdl", None, None, "metadata", None, None, None),
    )
    compiled.run.global_scratch_size = 16
    assert launch.starter(compiled, 4, 7)[0] is compiled.run


@pytest.mark.skipif(not launch.triton.__version__.startswith("3.6."), reason="about Triton 3.6")
def test_the_launcher_of_triton_3_6_is_known() -> None:
    """The inner function takes what `CudaLauncher.__call__` hands to it: as many arguments, in the same order."""
    import inspect

    from triton.backends.nvidia import driver

    source = inspect.getsource(driver.CudaLauncher.__call__)
    last = source[source.rindex("self.launch(") :]
    assert "".join(last.split()) == (
        "self.launch(gridX,gridY,gridZ,stream,function,self.launch_cooperative_grid,self.launch_pdl,"
        "global_scratch,profile_scratch,*args)"
    )


def test_launches_are_seen_by_those_who_watch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    compiled = Compiled()
    launch.start(compiled, 4, 0, (1, 2))
    assert compiled.launches == [(4, 1, 1, 7, "function", "metadata", None, None, None, 1, 2)] and not compiled.watched
    monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda _metadata: None)
    launch.start(compiled, 4, 0, (1, 2))
    assert len(compiled.launches) == 1 and compiled.watched == 1
