"""What becomes of a kernel with its arguments: a launch, or a compilation for a machine that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from attn_dsl.backend.cache_triton import compiling
from attn_dsl.backend.portable.load import PREFIX
from attn_dsl.backend.portable.start import Ready


class Runner(Protocol):
    def __call__(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        """`arguments` are positional; `options` holds the constexpr arguments, num_warps and num_stages."""


class Options(dict[str, Any]):
    """Options that are made once and launched many times: known by identity, so that a launch is found by a glance."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


_ready: dict[tuple[Any, ...], Ready] = {}
"""By options, device and what specializes an argument."""


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Run on the current stream of the device of the first argument, a tensor or a descriptor of one."""
    tensor = arguments[0]
    if not isinstance(tensor, torch.Tensor):
        tensor = tensor.base
    if not tensor.is_cuda:
        kernel[(programs,)](*arguments, **options)
        return
    index = tensor.device.index
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            launch(kernel, programs, arguments, options)
        return
    key = (options, index, *_kinds(arguments)) if type(options) is Options else None
    found = _ready.get(key) if key is not None else None
    if found is not None:
        found.start(programs, arguments, index)
        return
    with compiling(variant_of(options), lambda: inputs_of(kernel, arguments, options)):
        compiled = kernel[(programs,)](*arguments, **options)
    if key is not None and compiled is not None:
        _ready[key] = Ready(compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :]))


@dataclass
class Repeated:
    """A runner for launches on one device whose arguments are all alike for Triton where options are the same: what to
    launch is found once."""

    index: int = -1
    found: dict[Options, Ready] = field(default_factory=dict)

    def __call__(self, kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        found = self.found.get(options)  # type: ignore[call-overload]
        if found is not None and self.index == torch._C._cuda_getDevice():
            found.start(programs, arguments, self.index)
            return
        launch(kernel, programs, arguments, options)
        tensor = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0].base
        self.index = tensor.device.index
        ready = _ready.get((options, self.index, *_kinds(arguments))) if type(options) is Options else None
        if ready is not None:
            self.found[options] = ready  # type: ignore[index]


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """What of the arguments Triton compiles for; integers of tuples are made to look alike (`device.plain`)."""
    found: list[Any] = []
    for x in arguments:
        kind = type(x)
        if kind is tuple:
            for item in x:
                if type(item) is not int:
                    found += _kinds((item,))
            found.append(None)
        elif kind is int:
            found.append(-(2**31) <= x < 2**31)
        elif isinstance(x, torch.Tensor):
            found += (x.dtype, x.data_ptr() % 16 == 0)
        else:
            found.append(kind)
    return found


def variant_of(options: Mapping[str, Any]) -> str:
    """The name of the variant whose functions a kernel gets; `any` where it gets none."""
    modules = (option.module for option in options.values() if isinstance(option, JITFunction))
    return next((name.removeprefix(PREFIX).partition("_")[2] for name in modules if name.startswith(PREFIX)), "any")


def inputs_of(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[str, str]:
    """What a kernel is compiled from, by the names of its arguments, for people."""
    named = {"kernel": f"{kernel.__name__} {kernel.cache_key[:12]}"}
    named.update({name: _described(value) for name, value in zip(kernel.arg_names, arguments, strict=False)})
    named.update({name: _described(value, constant=True) for name, value in options.items()})
    return named


def _described(value: Any, *, constant: bool = False) -> str:
    match value:
        case torch.Tensor():
            aligned = "" if value.data_ptr() % 16 == 0 else ", not aligned"
            return f"{str(value.dtype).removeprefix('torch.')}*{aligned}"
        case JITFunction():
            return f"{value.__name__} {value.cache_key[:12]}"
        case tuple():
            return f"({', '.join(_described(item, constant=constant) for item in value)})"
        case _:
            return str(value) if constant or value is None else type(value).__name__


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
        source = _language(kernel)(kernel, signature, constants, attributes)
        with compiling(variant_of(options), lambda: inputs_of(kernel, arguments, options)):
            self.compiled.append(triton.compile(source, target=self.target, options=chosen.__dict__))


def _language(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource
