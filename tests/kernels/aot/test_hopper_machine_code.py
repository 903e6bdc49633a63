"""Kernels that ptxas 12.8 compiles wrong for Hopper are found before they run, and have a replacement that is right."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hf_flash_plus.inputs import AttentionInputs
from hf_flash_plus.kernels import decode_launch, launch, machine_code
from hf_flash_plus.masks import AttentionMask
from tests.kernels.aot.compiling import compiling_for, launches, warm_up


def _meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed() -> AttentionInputs:
    """One packed row with ALiBi: heads before rows, as a transposed tensor has them, in 40 and 16 dimensions."""
    q, k, v = _meta(1, 185, 40), _meta(1, 185, 40), _meta(1, 185, 16)
    mask = AttentionMask(
        causal=True,
        row_intervals=_meta(1, 185, 2, dtype=torch.int32),
        row_positions=_meta(1, 185, dtype=torch.int32),
    )
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return AttentionInputs(q, k, v, 40**-0.5, mask, softcap=20.0, alibi_slopes=_meta(1, dtype=torch.float32))


def masked(rows: int) -> AttentionInputs:
    """A window, keys with holes, a boolean bias, ALiBi and a softcap at once."""
    mask = AttentionMask(
        causal=True,
        window=(33, 7),
        key_mask=_meta(1, 80, dtype=torch.bool),
        key_holes=_meta(1, dtype=torch.int32),
        bias=_meta(1, 4, 1, 80, dtype=torch.bool).expand(1, 4, rows, 80),
    )
    q = _meta(1, 4, rows, 40).transpose(1, 2)
    slopes = _meta(1, 4, dtype=torch.float32)
    return AttentionInputs(
        q, _meta(1, 80, 1, 40), _meta(1, 80, 1, 16), 40**-0.5, mask, softcap=20.0, alibi_slopes=slopes
    )


def decoding(inputs: AttentionInputs) -> launch.Launch:
    call = launch.prepare(inputs)
    batch, nheads, nheads_k, rows, keys = call.sizes
    recipe = decode_launch.find_recipe(call.structure, nheads // nheads_k, rows, batch * nheads_k, 0, 0)
    out, lse = _meta(batch, rows, nheads, inputs.v_head_dim), _meta(batch, nheads, rows, dtype=torch.float32)
    return decode_launch.decode_launch(call, recipe, out, lse, keys, 1, None, None)


#: Calls of which a GPU said "out-of-range shared address", or gave other results than float64.
FAULTY = {
    "packed": lambda: launches(packed())["forward"],
    "masked": lambda: launches(masked(257))["forward"],
    "decoding": lambda: decoding(masked(13)),
}


@pytest.fixture
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been found yet, and heads of few columns are computed like all others."""
    monkeypatch.setattr(launch, "_careful", set())
    monkeypatch.setattr(launch, "_narrow", lambda *_: False)


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_compiled_wrong_is_found_and_replaced(name: str, _clean: None) -> None:
    with compiling_for("sm90"):
        if not machine_code.doubtful("sm90"):
            pytest.skip("this ptxas does not have the fault")
        built = FAULTY[name]()
        assert built.plan.doubtful
        with pytest.raises(machine_code.MiscompiledError, match="before it is written") as caught:
            machine_code.check(warm_up(built))
        inputs = packed() if name == "packed" else masked(257 if name == "masked" else 13)
        structure = launch.prepare(inputs).structure
        launch.be_careful(structure, caught.value)
        assert launch.prepare(inputs).structure == structure._replace(careful=True)
        kernel = warm_up(FAULTY[name]())
        assert "wgmma" not in kernel.asm["ptx"] and "mma.sync" in kernel.asm["ptx"]
        machine_code.check(kernel)
        with pytest.raises(machine_code.MiscompiledError):
            launch.be_careful(structure._replace(careful=True), caught.value)


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_compiled_wrong_is_not_launched(name: str, _clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiling_for("sm90"):
        if not machine_code.doubtful("sm90"):
            pytest.skip("this ptxas does not have the fault")
        built = FAULTY[name]()
        monkeypatch.setattr(type(built.plan.kernel), "__getitem__", lambda *args: pytest.fail("launched"))
        with pytest.raises(machine_code.MiscompiledError):
            built.run()
        assert not built.plan.compiled


def test_gradients_of_such_calls_need_no_wgmma_either(_clean: None) -> None:
    with compiling_for("sm90"):
        launch._careful.add(launch.prepare(packed()).structure)
        for name, built in launches(packed()).items():
            assert "wgmma" not in warm_up(built).asm["ptx"], name


@pytest.mark.parametrize("name", FAULTY)
def test_heads_of_few_columns_need_no_look(name: str) -> None:
    """The look does not find every fault that they have."""
    with compiling_for("sm90"):
        if not machine_code.doubtful("sm90"):
            pytest.skip("this ptxas does not have the fault")
        assert "wgmma" not in warm_up(FAULTY[name]()).asm["ptx"]


@pytest.mark.parametrize(
    "head_dim, v_head_dim, narrow", [(40, 16, True), (96, 24, True), (16, 64, True), (40, 40, False)]
)
def test_which_heads_have_few_columns(
    head_dim: int, v_head_dim: int, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for doubtful in (True, False):
        monkeypatch.setattr(launch, "doubtful", lambda arch, doubtful=doubtful: doubtful)
        found = launch._narrow.__wrapped__(SimpleNamespace(arch="sm90"), head_dim, v_head_dim)
        assert found == (narrow and doubtful)


def test_what_was_found_is_kept_beside_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[str] = []
    monkeypatch.setattr(machine_code, "unwritten", lambda cubin: found)
    kernel = SimpleNamespace(name="kernel", hash="0" * 64, asm={"ptx": "wgmma.mma_async", "cubin": b""})
    machine_code.check(kernel)
    monkeypatch.setattr(machine_code, "unwritten", lambda cubin: pytest.fail("looked at twice"))
    machine_code.check(kernel)
    kernel.hash = "1" * 64
    monkeypatch.setattr(machine_code, "unwritten", lambda cubin: ["R reads UR4 before it is written"])
    for _ in range(2):
        with pytest.raises(machine_code.MiscompiledError, match="kernel: R reads UR4"):
            machine_code.check(kernel)

    def missing(cubin: bytes) -> list[str]:
        raise RuntimeError("no nvdisasm")

    def strange(cubin: bytes) -> list[str]:
        raise TypeError("an operand of no known kind")

    kernel.hash = "2" * 64
    for unwritten, words in ((missing, "no nvdisasm"), (strange, "an operand of no known kind")):
        monkeypatch.setattr(machine_code, "unwritten", unwritten)
        with pytest.raises(machine_code.MiscompiledError, match=f"cannot be looked at: {words}"):
            machine_code.check(kernel)
    kernel.asm["ptx"] = "mma.sync"
    machine_code.check(kernel)  # nothing to look for


SASS = """
        /*0000*/                   ULDC UR4, c[0x0][0x210] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   UMOV UR8, UR4 ;
        /*0030*/                   UMOV UR9, 0x40000040 ;
.L_x_1:
        /*0040*/                   UIADD3.64 UR10, UR8, 0x2, URZ ;
        /*0050*/                   HGMMA.64x64x16.F32 R24, R4, gdesc[UR8], R24 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0070*/                   {instruction} ;
        /*0080*/                   HGMMA.64x64x16.F32 R24, R4, gdesc[UR12], R24, gsb0 ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "instruction, register",
    [("UMOV UR14, UR8", 8), ("UIADD3.64 UR14, UR10, 0x2, URZ", 10), ("ULDC.64 UR14, c[0x0][0x218]", None)],
)
def test_what_only_one_way_has_written_counts_as_unwritten(
    instruction: str, register: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SASS.replace("{instruction}", instruction)
    if "64" not in instruction:
        text = text.replace("/*0080*/", "/*0078*/                   UMOV UR15, 0x0 ;\n        /*0080*/")
    monkeypatch.setattr(machine_code, "_disassembler", lambda: "nvdisasm")
    monkeypatch.setattr(machine_code.subprocess, "run", lambda *args, **options: SimpleNamespace(stdout=text))
    found = machine_code.unwritten(b"")
    assert [int(re.search(r"reads UR(\d+)", line)[1]) for line in found] == ([] if register is None else [register])
