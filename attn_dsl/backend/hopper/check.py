"""What the assembler made of a kernel: registers spilled, products serialized, the machine's features in use.

ptxas serializes asynchronous products without a word unless it is asked (`-v`; its notes C7510 to C7514), and a spill
costs as much: either is a defect of a configuration. The words of ptxas are kept, for whoever must be told.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Build:
    """spilled: bytes of stores and loads. missing: features that the kernel should use and does not."""

    spilled: int
    notes: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def defect(self) -> str | None:
        """Why the build should not be used, or None."""
        if self.spilled:
            return f"ptxas spilled {self.spilled} bytes of registers"
        if self.notes:
            return f"ptxas: {self.notes[0]}"
        return f"no {self.missing[0]} in the PTX" if self.missing else None


FEATURES = {
    "bulk tensor loads": r"cp\.async\.bulk\.tensor",
    "asynchronous products": r"wgmma\.mma_async",
    "register reallocation": r"setmaxnreg",
}


@functools.lru_cache(maxsize=64)
def inspect(ptx: str) -> Build:
    """Assemble PTX for sm_90a and read what ptxas has to say."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [_tool("ptxas"), "-v", "-arch=sm_90a", str(source), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    notes = tuple(line.strip() for line in log.splitlines() if re.search(r"serializ|C75\d\d|setmaxnreg", line))
    missing = tuple(name for name, pattern in FEATURES.items() if not re.search(pattern, ptx))
    return Build(spilled, notes, missing)


def sass(ptx: str) -> str:
    """The machine code of PTX, disassembled."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        subprocess.run([_tool("ptxas"), "-arch=sm_90a", str(source), "-o", str(cubin)], check=True, capture_output=True)
        return subprocess.run(
            [_tool("cuobjdump"), "-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_ahead(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a launch with these arguments would compile, for sm_90; tensors may be on the device `meta`."""
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**options, "debug": False}
    bound, specialization, rest = bind(*arguments, **keywords)
    chosen, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, rest)
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(language(kernel, signature, constants, attributes), target=TARGET, options=chosen.__dict__)
