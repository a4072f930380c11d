"""What happens to a kernel with its arguments: it is launched, or compiled ahead of time for a machine that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature


class Runner(Protocol):
    def __call__(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """`arguments` are positional; `options` holds the constexpr arguments, num_warps and num_stages."""


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Run on the current stream of the device of the first argument, a tensor."""
    tensor = arguments[0]
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[(programs,)](*arguments, **options)
    else:
        kernel[(programs,)](*arguments, **options)


@dataclass
class Compiler:
    """A runner that compiles for `target` what a launch would compile, and launches nothing.

    Triton finds the result in its cache when the same call is made on such a GPU. Tensors may be on the device `meta`.
    """

    target: GPUTarget
    compiled: list[Any] = field(default_factory=list)

    def __call__(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        backend = make_backend(self.target)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        keywords = {**options, "debug": False}
        bound, specialization, rest = bind(*arguments, **keywords)
        chosen, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, rest)
        source = ASTSource(kernel, signature, constants, attributes)
        self.compiled.append(triton.compile(source, target=self.target, options=chosen.__dict__))
