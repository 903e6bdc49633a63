"""A look at compiled kernels for one fault of NVIDIA's assembler that nothing else shows.

ptxas before 12.9 (Triton 3.6 carries 12.8) compiles some kernels for Hopper so that a product in the second of two
loops takes the address of its operand from a uniform register that is written only on the way through the first loop,
or not at all. Where the first loop has nothing to do, the product reads other shared memory: a wrong result, or an
illegal access. Which kernels are hit depends on strides, masks and head dimensions at once. In right code no uniform
register can be read before it was written; that is what is looked for here, in the disassembly (``nvdisasm``, which
Triton carries, too). A register that was written for something else is not found: see ``launch.NARROW``.

:class:`MiscompiledError` ends a launch before it takes place; ``launch`` then computes the call with tiles so small
that their products need no such addresses.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

#: The first ptxas that does not do it.
FIXED = (12, 9)
#: The file beside a kernel in Triton's cache; the number is that of the rules below.
_VERDICT = "hf_flash_plus.machine_code.1"

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<text>[^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\((\.L_x_\d+)\)")
_UNIFORM = re.compile(r"\bUR(\d+)\b")
#: Opcodes that begin with U (or do not) and write a uniform register, the first of their operands that is one.
_WRITES = re.compile(r"^(U(?!TMA|BLK|SETMAXREG|CGABAR|SYNC)|R2UR|S2UR|REDUX|VOTEU)")
_ALL = (1 << 64) - 1


class MiscompiledError(RuntimeError):
    """The machine code of a kernel reads a register that nothing has written."""


@cache
def doubtful(arch: str) -> bool:
    """Whether kernels for ``arch`` (as in ``tiles.DeviceInfo``) come from an assembler that has the fault."""
    if arch != "sm90":
        return False
    from triton import knobs

    try:
        version = tuple(int(part) for part in knobs.nvidia.ptxas.version.split("."))
    except (AttributeError, RuntimeError, ValueError):
        return True  # which one it is cannot be told
    return version < FIXED


def check(compiled: Any) -> None:
    """Look at a kernel that Triton has compiled; what was found lies beside it in Triton's cache from then on.

    Raises:
        MiscompiledError: it has the fault, or there is no disassembler to tell.
    """
    if "wgmma" not in compiled.asm["ptx"]:
        return
    from triton.runtime.cache import get_cache_manager

    kept = get_cache_manager(compiled.hash)
    path = kept.get_file(_VERDICT)
    if path is not None:
        found = Path(path).read_text()
    else:
        try:
            found = "\n".join(unwritten(compiled.asm["cubin"]))
        except (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
                subprocess.SubprocessError) as problem:  # fmt: skip
            raise MiscompiledError(f"{compiled.name} cannot be looked at: {problem}") from problem
        with contextlib.suppress(OSError):  # a cache that is full, or cannot be written: it is looked at again then
            kept.put(found, _VERDICT, binary=False)
    if found:
        raise MiscompiledError(f"{compiled.name}: {found.splitlines()[0]}")


def unwritten(cubin: bytes) -> list[str]:
    """The instructions that may read a uniform register before any was written to it.

    Raises:
        RuntimeError: there is no ``nvdisasm``.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [_disassembler(), "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    guards, instructions, labels = _parse(text)
    if not any("GMMA" in instruction for instruction in instructions):
        return []
    access = [_access(instruction) for instruction in instructions]
    state = _reaching(guards, instructions, labels, [written for written, _ in access])
    return [
        f"{instruction} reads UR{(missing & -missing).bit_length() - 1} before it is written"
        for instruction, before, (_, read) in zip(instructions, state, access)
        if before is not None and (missing := before & read)
    ]


@cache
def _disassembler() -> str:
    from triton import knobs

    return str(knobs.nvidia.nvdisasm.path)


def _parse(text: str) -> tuple[list[bool], list[str], dict[str, int]]:
    """Whether each instruction is guarded by a predicate, the instructions, and where labels lie."""
    guards: list[bool] = []
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(instructions)
            continue
        found = _INSTRUCTION.match(line)
        if found:
            guards.append(found["guard"] is not None)
            instructions.append(found["text"].strip())
    return guards, instructions, labels


def _mask(*registers: int) -> int:
    return sum({1 << register for register in registers if register < 63})


def _access(instruction: str) -> tuple[int, int]:
    """The uniform registers that an instruction writes, and those that it reads, as bits."""
    opcode, _, rest = instruction.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    if "GMMA" in opcode:
        # Two descriptors of two registers each; the first is not used where that operand comes from registers.
        place = next(i for i, operand in enumerate(operands) if "gdesc" in operand)
        first = int(_UNIFORM.search(operands[place])[1])  # type: ignore[index]
        own = re.match(r"^-?R\d+", operands[place - 1]) is not None and place > 1
        return 0, _mask(*range(first + 2 if own else first, first + 4))
    wide = ".64" in opcode or ".WIDE" in opcode
    written = 0
    if _WRITES.match(opcode):
        for i, operand in enumerate(operands):
            register = re.fullmatch(r"UR(\d+)", operand)
            if register:
                first = int(register[1])
                written = _mask(*range(first, first + (4 if ".128" in opcode else 2 if wide else 1)))
                operands = operands[i + 1 :]
                break
            if not re.fullmatch(r"!?U?P[T\d]", operand):
                break
    read = 0
    for place, operand in enumerate(operands):
        for register in _UNIFORM.finditer(operand):
            first = int(register[1])
            pair = "desc[" in operand or ".64" in operand
            if ".WIDE" in opcode:
                pair = place == (2 if written else 3)  # 32 bits times 32 bits plus 64 bits
            elif ".64" in opcode and opcode.startswith("U"):
                pair = "LDC" not in opcode
            read |= _mask(first, first + 1) if pair else _mask(first)
    return written, read


def _successors(guard: bool, instruction: str, place: int, labels: dict[str, int]) -> list[int]:
    opcode, _, rest = instruction.partition(" ")
    if opcode.startswith(("EXIT", "RET")):
        return [place + 1] if guard else []
    if opcode.startswith("BR"):
        target = _TARGET.search(rest)
        following = [labels[target[1]]] if target and target[1] in labels else []
        # A branch may also have its predicate among its operands.
        return [*following, place + 1] if guard or re.match(r"\s*!?U?P\d", rest) or ".DIV" in opcode else following
    return [place + 1]


def _reaching(
    guards: list[bool], instructions: list[str], labels: dict[str, int], written: list[int]
) -> list[int | None]:
    """Before each instruction, the registers that no way to it must have written; None where no way leads to it.

    A write under a predicate counts: its reader has the same predicate.
    """
    state: list[int | None] = [None] * len(instructions)
    state[0] = _ALL
    work = [0]
    while work:
        place = work.pop()
        after = state[place] & ~written[place]  # type: ignore[operator]
        for following in _successors(guards[place], instructions[place], place, labels):
            if following < len(state):
                known = state[following]
                merged = after if known is None else known | after
                if merged != known:
                    state[following] = merged
                    work.append(following)
    return state
