"""A GPU for Triton's own launching code on a machine that has none: everything happens but the launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from attn_dsl.backend.cache_triton import compiling
from attn_dsl.backend.hopper.backward import attention_backward as hopper_backward
from attn_dsl.backend.hopper.backward_rows import count_turns, finish_queries, prepare_rows
from attn_dsl.backend.hopper.forward import attention_forward as hopper_forward
from attn_dsl.backend.portable import backward, decode, forward
from attn_dsl.backend.portable.run import inputs_of, variant_of

KERNELS = (
    forward.attention_forward,
    decode.attention_decode,
    decode.merge_splits,
    backward.attention_delta,
    backward.attention_keys_backward,
    backward.attention_queries_backward,
    hopper_forward,
    hopper_backward,
    prepare_rows,
    count_turns,
    finish_queries,
)


class FakeDriver:
    """The driver of one GPU."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def fake_gpu(arch: int = 90) -> Iterator[None]:
    """Triton takes itself to be on a GPU of architecture `sm_<arch>`; kernels forget before and after."""
    _forget()
    before = driver._active
    driver.set_active(FakeDriver(arch))
    try:
        yield
    finally:
        driver._active = before
        _forget()


def _forget() -> None:
    for kernel in KERNELS:
        kernel.device_caches.clear()


@contextlib.contextmanager
def keys_only() -> Iterator[set[str]]:
    """Collects the keys of kernels that would be compiled, and keeps Triton from compiling them."""
    keys: set[str] = set()
    for kernel in KERNELS:
        kernel._do_compile = lambda key, *_, name=kernel.__name__: keys.add(f"{name} {key}")
    try:
        yield keys
    finally:
        for kernel in KERNELS:
            del kernel._do_compile


@contextlib.contextmanager
def compilations() -> Iterator[list[bool]]:
    """For each kernel that Triton was asked for, whether it came from the disk cache."""
    found: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    try:
        yield found
    finally:
        knobs.compilation.listener = before


def ask(kernel: Any, programs: int, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """A runner that does what a launch does, up to the launch."""
    with compiling(variant_of(options), lambda: inputs_of(kernel, arguments, options)):
        kernel.run(*arguments, grid=(programs,), warmup=True, **options)
