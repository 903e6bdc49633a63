"""The calls that ``sanitizer`` runs under NVIDIA's compute-sanitizer: few, small, and every kernel at least once.

python -m tests.gpu.sanitized portable     runs a group without the tool, as a check of the group itself
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import hf_flash_plus
from tests.kernels.cases import Case, build

BF16 = torch.bfloat16
#: Two tiles and a bit of the others, so that edges, whole tiles and skipped tiles all come.
BASE = Case((), 1, 193, 257, 4, 2, 64, 64, BF16)
WIDE = replace(BASE, head_dim=128, v_head_dim=128)

PORTABLE = [
    BASE,
    replace(BASE, features=("causal",)),
    replace(BASE, features=("causal", "dropout")),
    replace(BASE, features=("packed", "softcap")),
    replace(BASE, features=("left_window", "sinks")),
    replace(BASE, features=("key_mask", "alibi")),
    replace(BASE, features=("bias",)),
    replace(WIDE, features=("causal",)),
    replace(BASE, features=("causal",), dtype=torch.float32),
]
HOPPER_FORWARD = [
    BASE,
    replace(BASE, features=("causal",)),
    replace(BASE, features=("packed", "softcap", "sinks")),
    WIDE,
    replace(WIDE, features=("causal",)),
    replace(WIDE, features=("left_window", "sinks")),
    replace(WIDE, features=("packed",)),
    replace(BASE, features=("causal",), head_dim=192, v_head_dim=128),
    replace(BASE, features=("causal",), head_dim=256, v_head_dim=256),
]
HOPPER_BACKWARD = [
    BASE,
    replace(BASE, features=("packed",)),
    WIDE,
    replace(WIDE, features=("causal",)),
    replace(WIDE, features=("packed", "softcap")),
]

Group = Iterator[tuple[str, Callable[[], object]]]


def portable() -> Group:
    """Forward and backward of the portable kernels."""
    from hf_flash_plus.kernels import launch
    from hf_flash_plus.masks import additive

    for case in PORTABLE:

        def run(case: Case = case) -> object:
            built = build(case, "cuda")
            out, lse = launch.forward(built.inputs)
            bias_grad = additive(built.inputs.mask) is not None
            return out, launch.backward(built.inputs, out, lse, built.dout, bias_grad=bias_grad)

        yield str(case), run


def hopper_forward() -> Group:
    """The Gluon kernel of the forward, and the one that summarises row intervals."""
    from hf_flash_plus.kernels.hopper import forward_launch

    for case in HOPPER_FORWARD:

        def run(case: Case = case) -> object:
            built = build(case, "cuda")
            reason = forward_launch.forward_reason(built.inputs)
            assert reason is None, reason
            return forward_launch.forward(built.inputs)

        yield str(case), run


def hopper_backward() -> Group:
    """The Gluon kernels of the backward, in every mode."""
    from hf_flash_plus.kernels import launch
    from hf_flash_plus.kernels.hopper import backward_launch

    for mode in backward_launch.MODES:
        for case in HOPPER_BACKWARD:

            def run(case: Case = case, mode: str = mode) -> object:
                built = build(case, "cuda")
                out, lse = launch.forward(built.inputs)
                return backward_launch.backward(built.inputs, out, lse, built.dout, mode=mode)

            yield f"{mode} {case}", run


def decode() -> Group:
    """One query row, keys in several parts: from a cache, from pages, and from a padded batch."""
    torch.manual_seed(0)
    k, v = (torch.randn(2, 2048, 2, 64, dtype=BF16).cuda() for _ in range(2))
    q = torch.randn(2, 1, 8, 64, dtype=BF16).cuda()
    pages = [t.reshape(256, 16, 2, 64) for t in (k, v)]
    table = torch.randperm(256, dtype=torch.int32).reshape(2, 128).cuda()
    lengths = torch.tensor([2048, 77], dtype=torch.int32).cuda()

    def attend(cache: list[torch.Tensor], **options: object) -> Callable[[], object]:
        return lambda: hf_flash_plus.flash_attn_with_kvcache(q, *cache, **options)

    yield "cache", attend([k, v])
    yield "cache, lengths, window", attend([k, v], cache_seqlens=lengths, causal=True, window_size=(500, 0))
    yield "pages", attend(pages, cache_seqlens=lengths, block_table=table, causal=True)
    large = [t.reshape(16, 256, 2, 64) for t in (k, v)]
    few = torch.randperm(16, dtype=torch.int32).reshape(2, 8).cuda()
    yield "large pages", attend(large, cache_seqlens=lengths, block_table=few, causal=True)
    yield "layers", lambda: [_layer(q, k, v) for _ in range(3)]


def _layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As a layer of a model: the first call is understood, the second combines its splits in the same launch, the third
    has a ticket."""
    from hf_flash_plus.integration.attention import flash_plus_attention
    from hf_flash_plus.integration.mask_interface import flash_plus_mask

    mask = flash_plus_mask(q.shape[0], 1, k.shape[1], k.shape[1] - 1, device=k.device)
    with torch.no_grad():
        return flash_plus_attention(torch.nn.Module(), *(t.transpose(1, 2) for t in (q, k, v)), mask)[0]


def handshake() -> Group:
    """A control: right, and synchronised as the Hopper kernels are."""
    from tests.gpu import controls

    def run() -> None:
        given, taken = controls.hand_over(wait=True)
        assert torch.equal(given, taken)

    yield "with mbarriers", run


def relay() -> Group:
    """A control: the same by way of a third warp."""
    from tests.gpu import controls

    def run() -> None:
        given, taken = controls.hand_on()
        assert torch.equal(given, taken)

    yield "with mbarriers, by way of another warp", run


def race() -> Group:
    """A control: the same without waiting."""
    from tests.gpu import controls

    yield "without mbarriers", lambda: controls.hand_over(wait=False)


def bounds() -> Group:
    """A control: reads and writes behind a tensor's end."""
    from tests.gpu import controls

    yield "behind the end", controls.read_beyond


GROUPS: dict[str, Callable[[], Group]] = {
    "portable": portable,
    "decode": decode,
    "hopper_forward": hopper_forward,
    "hopper_backward": hopper_backward,
    "handshake": handshake,
    "relay": relay,
    "race": race,
    "bounds": bounds,
}

#: Printed after each call that ended, so that the parent counts what the tool has seen.
DONE = "sanitized: "


def main(name: str) -> None:
    """Run a group; a call that raises ends it."""
    with hf_flash_plus.use_provider("triton"):
        for title, run in GROUPS[name]():
            run()
            torch.cuda.synchronize()
            print(f"{DONE}{title}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
