"""What the assembler made of a kernel: registers spilled, products serialized, the machine's features in use.

ptxas serializes asynchronous products without a word unless it is asked (`-v`; its notes C7510 to C7514), and a spill
in the loop costs as much: either is a defect of a configuration. The words of ptxas are kept on disk with the kernel's
key, so that they are asked for once, not once a process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from attn_dsl.backend import cache

SPILLS = 256
"""Bytes that ptxas may spill: so few are the scalars of a program, kept beside the loop for the next query tile."""
_FILE = "verdict.json"


@dataclass(frozen=True)
class Build:
    """spilled: bytes of stores and loads. missing: features that the kernel should use and does not."""

    spilled: int
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    def defect_beyond(self, spills: int) -> str | None:
        """Why the build should not be used, or None where no more than so many bytes are spilled and all is well."""
        if self.spilled > spills:
            return f"ptxas spilled {self.spilled} bytes of registers"
        if self.notes:
            return f"ptxas: {self.notes[0]}"
        return f"no {self.missing[0]} in the PTX" if self.missing else None


FEATURES = {
    "bulk tensor loads, or copies of rows": r"cp\.async\.(bulk\.tensor|cg)",
    "asynchronous products": r"wgmma\.mma_async",
    "register reallocation": r"setmaxnreg",
}


def inspected(name: str, kernel: Any) -> Build:
    """`inspect` of a kernel that Triton compiled for the variant of a name; the disk is asked first."""
    key = cache.digest(str(kernel.hash), _version())
    entry = cache.find(cache.VERDICTS, name, key)
    if entry is None:
        found = inspect(kernel.asm["ptx"])
        data = {_FILE: json.dumps(dataclasses.asdict(found)).encode()}
        cache.put(cache.VERDICTS, name, key, data, {"kernel": str(kernel.hash)})
        return found
    said = json.loads(entry.files[_FILE].read_bytes())
    return Build(said["spilled"], tuple(said["notes"]), tuple(said["missing"]))


@functools.cache
def _version() -> str:
    """What is looked for: this file."""
    return cache.digest(Path(__file__).read_text())


@functools.lru_cache(maxsize=64)
def inspect(ptx: str) -> Build:
    """Assemble PTX for sm_90a and read what ptxas has to say."""
    with tempfile.TemporaryDirectory() as folder:
        log = _assemble(ptx, Path(folder, "kernel.cubin"))
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    notes = tuple(line.strip() for line in log.splitlines() if re.search(r"serializ|C75\d\d|setmaxnreg", line))
    missing = tuple(name for name, pattern in FEATURES.items() if not re.search(pattern, ptx))
    return Build(spilled, notes, missing)


def sass(ptx: str) -> str:
    """The machine code of PTX, disassembled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        _assemble(ptx, cubin)
        return _said([knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]).stdout


def _assemble(ptx: str, cubin: Path) -> str:
    """Write the machine code of PTX; what ptxas says on the way.

    A kernel that was kept on disk may have been written for a newer ptxas than this process takes, since torch.compile
    points Triton to one. Its `.version` is then lowered to the newest that is read: a kernel for sm_90a needs no more.
    """
    source = cubin.with_suffix(".ptx")
    source.write_text(ptx)
    command = [_ptxas(), "-v", "-arch=sm_90a", str(source), "-o", str(cubin)]
    try:
        return _said(command).stderr
    except subprocess.CalledProcessError as refused:
        newest = re.search(r"Unsupported \.version [\d.]+; current version is '([\d.]+)'", refused.stderr)
        if newest is None:
            raise
    source.write_text(re.sub(r"\.version [\d.]+", f".version {newest[1]}", ptx, count=1))
    return _said(command).stderr


def _said(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def _ptxas() -> str:
    """The one that Triton takes: torch.compile may have pointed it to that of another CUDA, which reads other PTX."""
    return str(get_ptxas(90).path)
