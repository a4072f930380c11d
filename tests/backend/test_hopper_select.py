"""Which kernels a call on a GPU takes, decided without one: capabilities and compilers are made up here."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hopper_support import GOOD, HOPPER, compiler, fresh, tensor
from portable_support import program_of
from torch import Tensor

from attn_dsl.backend import gpu, operators
from attn_dsl.backend.execute import GPU, Options, Program
from attn_dsl.backend.hopper import check, launch
from attn_dsl.backend.hopper.configs import candidates
from attn_dsl.backend.portable.launch import Call
from attn_dsl.backend.select import options, select
from attn_dsl.errors import BindingError

pytestmark = pytest.mark.usefixtures("own_cache")


def call(query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **more: Any) -> Call:
    key = query if key is None else key
    return Call(query, key, key if value is None else value, (), (), (), 0.1, **more)


PLAIN = call(tensor(2, 4, 300, 128))


def route(of: Program, bound: Call, capability: tuple[int, int] | None = HOPPER) -> gpu.Route:
    return gpu.route(of, bound, capability, compiler()[1])


def test_calls_that_fit_run_on_hopper_kernels(says: Callable[..., None]) -> None:
    says(GOOD)
    found = route(fresh("causal"), PLAIN)
    assert found.backend == "hopper" and found.choice is not None and not found.choice.rejected
    assert found.choice.config == candidates(128, 128, frozen=True)[0]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0), None])
def test_other_devices_run_on_portable_kernels(capability: tuple[int, int] | None) -> None:
    found = route(fresh("causal"), PLAIN, capability)
    assert found.backend == "portable" and found.choice is None
    assert ("not 9.0" if capability else "not on an NVIDIA GPU") in str(found.reason)


WIDE = tensor(2, 4, 300, 130)
REFUSED = {
    "element type is float32": call(tensor(2, 4, 300, 128, dtype=torch.float32)),
    "element type is float64": call(tensor(2, 4, 300, 128, dtype=torch.float64)),
    "head dimension 100": call(tensor(2, 4, 300, 100)),
    "head dimension 512": call(tensor(2, 4, 300, 512)),
    "rows of `query`": call(WIDE[..., :128], tensor(2, 4, 300, 128)),
    "rows of `key`": call(tensor(2, 4, 300, 128), WIDE[..., :128]),
    "rows of `value`": call(tensor(2, 4, 300, 128), None, tensor(2, 4, 128, 300).mT),
    "`key` with a broadcast axis": call(tensor(2, 4, 300, 128), tensor(1, 4, 300, 128).expand(2, -1, -1, -1)),
    "`query` at a multiple of 16 bytes": call(torch.empty(36865, dtype=torch.bfloat16)[1:].view(1, 4, 72, 128)),
    "positions need 64 bits": call(tensor(2, 4, 300, 128), q_offset=2**40),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_calls_that_do_not_fit_run_on_portable_kernels_and_say_why(reason: str) -> None:
    found = route(fresh("causal"), REFUSED[reason])
    assert found.backend == "portable" and reason in str(found.reason)
    assert f"backend    portable, since {found.reason}" in gpu.describe(fresh("causal"), REFUSED[reason], found, HOPPER)


def test_what_fits_all_the_same() -> None:
    heads_inside = tensor(2, 300, 4, 136)[..., :128].transpose(1, 2)
    one = tensor(1, 1, 300, 130)[:, :, :1, :128]
    for bound in (call(heads_inside), call(one), call(tensor(2, 4, 1, 80), precise=True), call(tensor(1, 2, 9, 192))):
        assert launch.refusal(program_of("causal").kernels, bound) is None


def test_a_bad_build_makes_way_for_the_next_configuration(says: Callable[..., None]) -> None:
    first, second = candidates(128, 128, frozen=True)[:2]
    says(check.Build(5000, (), ()), check.Build(8, (), ()))
    of = fresh("causal")
    found = route(of, PLAIN)
    assert found.choice is not None
    assert found.choice.config == second and found.choice.rejected == (
        (first, "ptxas spilled 5000 bytes of registers"),
    )
    text = gpu.describe(of, PLAIN, found, HOPPER)
    assert f"tiles      {second}" in text and f"rejected   {first}: ptxas spilled 5000 bytes" in text


def test_where_no_build_is_good_the_portable_kernels_run(says: Callable[..., None]) -> None:
    serial = check.Build(0, ("C7510: Potential Performance Loss: wgmma.mma_async instructions are serialized",), ())
    says(*[serial] * 9)
    of = fresh("noop")
    found = route(of, PLAIN)
    assert found.backend == "portable" and "serialized" in str(found.reason)
    text = gpu.describe(of, PLAIN, found, HOPPER)
    assert text.count("rejected") == len(candidates(128, 128, frozen=True)) and "no configuration is good" in text


def test_one_choice_serves_all_calls_of_a_kind(says: Callable[..., None]) -> None:
    says(*[GOOD] * 9)
    of = fresh("causal")
    made, compile = compiler()
    for length, heads in ((300, 4), (65, 1), (5000, 32)):
        for bound in (call(tensor(1, heads, length, 128)), call(tensor(3, heads, length, 128), q_offset=7)):
            assert gpu.route(of, bound, HOPPER, compile).backend == "hopper"
    assert len(made) == 1
    for bound in (call(tensor(1, 1, 80, 64)), call(tensor(1, 1, 80, 128, dtype=torch.float16))):
        gpu.route(of, bound, HOPPER, compile)
    assert len(made) == 3


def test_the_word_of_the_assembler_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def inspect(ptx: str) -> check.Build:
        said.append(ptx)
        return check.Build(12, ("a note",), ("a feature",))

    monkeypatch.setattr(check, "inspect", inspect)
    kernel = SimpleNamespace(hash="abc", asm={"ptx": "text"})
    assert (
        check.inspected("causal", kernel)
        == check.inspected("causal", kernel)
        == check.Build(12, ("a note",), ("a feature",))
    )
    assert said == ["text"]
    check.inspected("causal", SimpleNamespace(hash="abd", asm={"ptx": "other"}))
    assert said == ["text", "other"]


PTX = """.version {version}
.target sm_90a
.address_size 64
.visible .entry nothing() {{ ret; }}
"""


def test_a_kernel_written_for_a_newer_assembler_is_looked_at_all_the_same() -> None:
    assert check.inspect(PTX.format(version="99.0")) == check.inspect(PTX.format(version="8.0"))
    with pytest.raises(subprocess.CalledProcessError):
        check.inspect(PTX.format(version="8.0").replace("ret", "no_such_instruction"))


def test_insisting_on_hopper_kernels_where_they_cannot_run_is_an_error() -> None:
    of = program_of("causal")
    query = torch.randn(1, 1, 8, 64)
    bound = of.binder.bind(query, query, query, None, 0, {})
    with pytest.raises(BindingError, match="the Hopper kernels do not take the call: the tensors are not on"):
        operators.attention(of, bound, Options("hopper"))


def test_every_configuration_fits_the_shared_memory_and_the_registers() -> None:
    for dim in (64, 128, 256):
        for value_dim in (64, 128, 256):
            found = candidates(dim, value_dim, frozen=True)
            assert found
            for config in found:
                assert config.own_output or dim == value_dim
                assert 128 * (config.groups * config.registers + 24) <= 65536


def test_the_device_decides_the_backend() -> None:
    assert options(torch.device("cuda")).backend == GPU and options(torch.device("cpu")).backend == "cpu"
    assert select(torch.device("cuda")).name == GPU
    with pytest.raises(BindingError, match="cpu, cuda"):
        select(torch.device("meta"))


def test_the_source_for_a_gpu_shows_what_both_kinds_of_kernels_call() -> None:
    import attn_dsl

    attention = attn_dsl.compile("softcap")
    both = attention.source("cuda", torch.bfloat16)
    assert "# Hopper kernels" in both and "def residue(" in both and "def kv_ranges(" in both
    assert "# Hopper kernels" not in attention.source("cuda", torch.float32)
