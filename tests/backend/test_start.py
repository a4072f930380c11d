"""A kernel that was launched before is started with what Triton would pass, and by Triton where it is not as known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from attn_dsl.backend.portable import start
from attn_dsl.backend.portable.start import Ready

if not hasattr(nvidia, "make_launcher"):
    pytest.skip("another Triton than 3.6 launches another way", allow_module_level=True)

ABOUT = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 64, 64], "fp4_padded": False}


class Compiled:
    """A kernel whose launcher only notes what it gets, and its C function, where there are no descriptors, likewise."""

    def __init__(self, descriptors: int, **more: Any) -> None:
        self.got: list[tuple[Any, ...]] = []
        signature = {i: "tensordesc<f16>" if i < descriptors else "i32" for i in range(descriptors + 2)}
        metas = [{**ABOUT, "swizzle": i} for i in range(descriptors)]
        launch = nvidia.wrap_handle_tensordesc(lambda *x: self.got.append(x), signature, metas)
        fixed = {"launch_pdl": True, "launch_cooperative_grid": False, "num_ctas": 1, "global_scratch_align": 1,
                 "profile_scratch_align": 1, "global_scratch_size": 0, "profile_scratch_size": 0}  # fmt: skip
        self.run = SimpleNamespace(launch=launch, **{**fixed, **more})
        self.function, self.packed_metadata, self.metadata = 7, (4, 1, 0), SimpleNamespace()
        self.asked = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        self.asked += 1
        return lambda *x, stream: self.by_triton(grid[0], x, stream)

    def by_triton(self, programs: int, arguments: tuple[Any, ...], stream: int) -> tuple[Any, ...]:
        front = (programs, 1, 1, stream, self.function, self.packed_metadata, None, None, None)
        nvidia.CudaLauncher.__call__(self.run, *front, *arguments)
        return self.got[-1]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = SimpleNamespace(fill_tma_descriptor=lambda *x: ("map", *x))
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 11 + index, raising=False)


def described(rows: int) -> Any:
    base = torch.empty(1, 2, rows, 64)
    strides = [2 * rows * 64, rows * 64, 64, 1]
    return SimpleNamespace(base=base, shape=[1, 2, rows, 64], strides=strides, padding="zero", known={})


@pytest.mark.parametrize("descriptors", [1, 4])
def test_descriptors_and_arguments_arrive_as_triton_passes_them(descriptors: int) -> None:
    compiled = Compiled(descriptors)
    arguments = (*(described(10 + i) for i in range(descriptors)), 5, (1, 2))
    Ready(compiled, ("constant", None)).start(9, arguments, 2)
    assert compiled.asked == 0 and len(compiled.got) == 1
    assert compiled.got[0] == compiled.by_triton(9, (*arguments, "constant", None), 13)


def test_a_descriptor_is_made_once_for_an_address_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "ADDRESSES", 3)
    compiled, one = Compiled(1), described(10)
    ready = Ready(compiled, ())
    bases = [torch.empty(16) for _ in range(5)]
    for base in [bases[0], *bases, *bases]:
        one.base = base
        ready.start(9, (one, 1, 2), 0)
        assert compiled.got[-1] == compiled.by_triton(9, (one, 1, 2), 11)
        assert base.data_ptr() in one.known and len(one.known) <= 3


def test_hooks_and_memory_of_its_own_are_left_to_triton() -> None:
    for compiled in (Compiled(1, global_scratch_size=8), Compiled(1, profile_scratch_size=8)):
        assert Ready(compiled, ()).launcher is None
    compiled = Compiled(1)
    ready = Ready(compiled, ())
    watch = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(watch)
    try:
        ready.start(9, (described(3), 1, 2), 0)
    finally:
        knobs.runtime.launch_enter_hook.remove(watch)
    assert compiled.asked == 1
    ready.start(9, (described(3), 1, 2), 0)
    assert compiled.asked == 1 and len(compiled.got) == 2


def test_a_launcher_that_is_not_known_is_left_to_triton() -> None:
    compiled = Compiled(2)
    compiled.run.launch = lambda *x: compiled.got.append(x)
    assert Ready(compiled, ()).launcher is None
    compiled.run.launch = nvidia.wrap_handle_tensordesc(lambda *x: None, {0: "i32", 1: "tensordesc<f16>"}, [ABOUT])
    assert Ready(compiled, ()).launcher is None
