"""What a kernel became: registers that spilled, products, what it waits for."""

from __future__ import annotations

import re
import subprocess
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import triton

_PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_PRODUCT = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\.\S*?\.(s8|bf16|f16|tf32)\.")
_MULTIPLIES = re.compile(r"\w*MMA\.")
_LABEL = re.compile(r"^(\.L_\S+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(.*?);")
_ACCESS = re.compile(r"(?:LD|LDG|LDGSTS|ST|STG|ATOM|ATOMG|RED|REDG|UBLKCP)\b")  # of the memory
_WAIT = "ACQBULK"  # griddepcontrol.wait
_JUMP = re.compile(r"^BRA\S*\s.*`\((\.L_\S+)\)")


class MachineCode(NamedTuple):
    """A kernel as compiled for an NVIDIA GPU.

    Attributes:
        stack_bytes: a thread's in memory, where what registers do not hold is spilled.
        loop_spills: moves of spilled registers in loops that multiply.
        products: what its tensor-core instructions multiply, in PTX's names.
        waiting_loads: loads into registers, in loops that multiply: each waits for memory, where a
            copy to shared memory is begun steps before its use.
        fetches: instructions that ask for memory to be in the L2 cache.
        early_accesses: to memory, before it waits for the kernel in front of it; all of them if it
            does not wait.
    """

    stack_bytes: int
    loop_spills: int
    products: list[str]
    waiting_loads: int
    fetches: int
    early_accesses: int


def machine_code(cubin: bytes, ptx: str) -> MachineCode:
    """Read what Triton made."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    multiplying = [loop for loop in _loops(listing) if any(map(_MULTIPLIES.match, loop))]
    in_loops = [instruction for loop in multiplying for instruction in loop]
    return MachineCode(
        stack_bytes=sum(map(int, re.findall(r"STACK:(\d+)", usage))),
        loop_spills=sum(instruction.startswith(("LDL", "STL")) for instruction in in_loops),
        products=sorted(set(_PRODUCT.findall(ptx))),
        waiting_loads=sum(instruction.startswith("LDG.") for instruction in in_loops),
        fetches=sum(line.startswith("CCTL.E.PF2") for line in _instructions(listing)),
        early_accesses=sum(
            _ACCESS.match(instruction) is not None
            for instruction in takewhile(_is_no_wait, _instructions(listing))
        ),
    )


def _is_no_wait(instruction: str) -> bool:
    return not instruction.startswith(_WAIT)


def _instructions(listing: str) -> list[str]:
    """All of them, in order."""
    found = map(_INSTRUCTION.match, listing.splitlines())
    return [each[1] for each in found if each]


def _loops(listing: str) -> list[list[str]]:
    """From each label to the jumps back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found[1])
            jump = _JUMP.match(found[1])
            if jump and jump[1] in labels:
                loops.append(instructions[labels[jump[1]] :])
    return loops


def _run(program: str, *arguments: str) -> str:
    command = [str(_PROGRAMS / program), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
