"""Compiling ahead of time, and for what kernels are compiled at all: everything but the launch, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import ask, compilations, fake_gpu, keys_only

import attn_dsl
from attn_dsl.backend import cache
from attn_dsl.backend.build import Request, build
from attn_dsl.backend.execute import Program, program_for
from attn_dsl.backend.portable import launch
from attn_dsl.errors import BindingError
from attn_dsl.frontend import load
from attn_dsl.passes import pipeline

TABLE = """attention table(reach: int = 3, cap: float = 5.0)
tensor bias: float32[H, 2 * reach + 1]
score = cap * tanh((score + bias[h, clamp(k - q, -reach, reach) + reach]) / cap)
mask = 0 <= q - k < 100 * reach
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTN_DSL_CACHE_DIR", str(tmp_path))
    return cache.folder()


def program(source: str) -> Program:
    return program_for(pipeline.run(load(source), {}, stop_after="simplify").variant)


def call(
    of: Program,
    *parameters: Any,
    tensors: tuple[torch.Tensor, ...] = (),
    shape: tuple[int, int, int, int, int] = (1, 4, 2, 128, 128),
    head_dim: int = 64,
    **more: Any,
) -> launch.Call:
    batch, heads, kv_heads, q_len, kv_len = shape
    query = torch.empty(batch, heads, q_len, head_dim, dtype=torch.bfloat16)
    key = torch.empty(batch, kv_heads, kv_len, head_dim, dtype=torch.bfloat16)
    fields = {"scale": 0.1, "capability": (9, 0), **more}
    return launch.Call(query, key, torch.empty_like(key), parameters, tensors, (), **fields)


def both_passes(of: Program, bound: launch.Call, wanted: frozenset[str] = frozenset()) -> None:
    out, lse, shifted = launch.forward(of.kernels, bound, ask)
    launch.backward(of.kernels, bound, out, shifted, torch.empty_like(out), None, wanted, run=ask)
    launch.backward(of.kernels, bound, out, shifted, torch.empty_like(out), lse, wanted, run=ask)


def test_lengths_windows_caps_offsets_scales_batches_and_heads_are_run_time_arguments() -> None:
    of = program(TABLE)
    with fake_gpu(), keys_only() as keys:
        counts = []
        for n in range(1, 101):
            reach, heads = 16 * n if n % 2 else n, 1 + n % 7
            table = torch.zeros(heads * 2, 2 * reach + 1)
            shape = (1 + n % 5, heads * 2, heads, 16 * n if n % 3 else n, 1 + 7 * n)
            bound = call(of, reach, n / 3, tensors=(table,), shape=shape, q_offset=n * (n % 4), scale=1 / n)
            both_passes(of, bound, frozenset({"bias"}))
            counts.append(len(keys))
    assert set(counts) == {5}, "forward, delta with and without the gradient of lse, keys, queries; once"


def test_what_does_specialize_a_kernel() -> None:
    """Every further kernel that a call may ask for is listed here."""
    of = program("sliding_window")

    def forward(bound: launch.Call) -> str:
        with fake_gpu(), keys_only() as keys:
            launch.forward(of.kernels, bound, ask)
        (key,) = keys
        return key

    plain = forward(call(of, 64))
    query = torch.empty(1, 4, 128, 72, dtype=torch.bfloat16)[..., :64]
    shifted = torch.empty(1 * 4 * 128 * 64 + 1, dtype=torch.bfloat16)[1:].view(1, 4, 128, 64)
    transposed = torch.empty(1, 4, 64, 128, dtype=torch.bfloat16).mT
    odd = torch.empty(1, 4, 128, 65, dtype=torch.bfloat16)[..., :64]

    def with_query(x: torch.Tensor) -> str:
        return forward(launch.Call(x, x, x, (64,), (), (), 0.1, capability=(9, 0)))

    assert with_query(query) == plain, "strides that are multiples of 8 are all alike"
    different = {
        "head dimension": forward(call(of, 64, head_dim=128)),
        "addresses that are no multiple of 16 bytes": with_query(shifted),
        "a last axis that is not contiguous": with_query(transposed),
        "strides that are no multiple of 8": with_query(odd),
        "q_offset as a tensor": forward(call(of, 64, q_offset=torch.zeros(1, dtype=torch.int64))),
        "positions past 32 bits": forward(call(of, 2**40)),
        "a parameter as a tensor": forward(call(of, torch.tensor(64))),
        "other tiles": forward(call(of, 64, tiles=launch.tiles.INTERPRETED)),
    }
    assert plain not in different.values() and len(set(different.values())) == len(different)


def test_what_is_built_ahead_is_not_compiled_again() -> None:
    of = program(TABLE)
    built = list(build(of, Request("sm_80", head_dim=64)))
    names = [kernel.name for kernel in built]
    assert names.count("attention_forward") == 1 and names.count("attention_keys_backward") == 2
    assert all(kernel.shared <= 163 * 1024 for kernel in built)
    bound = call(of, 9, 2.0, tensors=(torch.zeros(4, 19),), shape=(3, 4, 2, 1000, 777), q_offset=5, capability=(8, 0))
    with fake_gpu(80), compilations() as cached:
        both_passes(of, bound)
        both_passes(of, bound, frozenset({"bias"}))
    assert cached and all(cached)
    with fake_gpu(80), compilations() as cached:
        launch.forward(of.kernels, call(of, 9, 2.0, tensors=(torch.zeros(4, 19),), head_dim=32, capability=(8, 0)), ask)
    assert cached == [False], "the counter does see a compilation"


def test_a_damaged_kernel_is_compiled_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_said", set())
    of = program("noop")
    list(build(of, Request("sm_80", head_dim=32, backward=False)))
    (binary,) = (folder / "kernels").glob("noop.attention_forward-*/attention_forward.cubin")
    sound = binary.read_bytes()
    binary.write_bytes(b"not a kernel")
    with pytest.warns(cache.CacheWarning, match="contents of attention_forward.cubin"), compilations() as cached:
        list(build(of, Request("sm_80", head_dim=32, backward=False)))
    assert cached == [False, True], "whole and ragged tiles ask for one kernel"
    assert binary.read_bytes() == sound


def test_entries_say_what_made_their_key(folder: Path) -> None:
    list(build(program("causal"), Request("sm_80", torch.float16, head_dim=32, backward=False)))
    entry = next(entry for entry in cache.entries() if entry.path.name.startswith("causal.attention_forward-"))
    assert entry.inputs["D"] == "32" and entry.inputs["query"] == "float16*" and entry.inputs["q_offset"] == "int"
    assert entry.inputs["target"] == {"backend": "cuda", "arch": 80, "warp_size": 32}


def test_other_users_of_triton_keep_their_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from triton import knobs
    from triton.runtime.cache import FileCacheManager, get_cache_manager

    from attn_dsl.backend.cache_triton import KernelCache, compiling

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    before = dict(vars(knobs.cache))
    elsewhere: list[Any] = []
    with compiling("causal", dict):
        assert isinstance(get_cache_manager("00"), KernelCache)
        other = threading.Thread(target=lambda: elsewhere.append(get_cache_manager("00")))
        other.start()
        other.join()
        with compiling("noop", dict):
            assert get_cache_manager("00").name == "noop"
        assert get_cache_manager("00").name == "causal"
    assert type(elsewhere[0]) is FileCacheManager and type(get_cache_manager("00")) is FileCacheManager
    assert dict(vars(knobs.cache)) == before

    class Theirs(FileCacheManager):  # type: ignore[misc]
        pass

    monkeypatch.setattr(knobs.cache, "manager_class", Theirs)
    with compiling("causal", dict):
        assert isinstance(get_cache_manager("00"), KernelCache)
    assert isinstance(get_cache_manager("00"), Theirs)


def test_the_hash_of_triton_is_computed_once_for_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import cache as triton_cache

    from attn_dsl.backend import cache_triton

    original = cache_triton._hash_of_triton
    if original is None:
        pytest.skip("this Triton has its hash elsewhere")
    computed: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(cache_triton, "_hash_of_triton", lambda: computed.append("") or f"hash {len(computed)}")
        for files, expected in ((["a"], "hash 1"), (["a"], "hash 1"), (["a", "b"], "hash 2")):
            patch.setattr(cache_triton, "_files_of_triton", lambda files=files: iter(files))
            cache_triton._remembered_key.cache_clear()  # as in a new process
            assert cache_triton._remembered_key() == expected
    cache_triton._remembered_key.cache_clear()
    assert triton_cache.triton_key is original
    with cache_triton.compiling("noop", dict):
        assert triton_cache.triton_key() == original()
    assert triton_cache.triton_key is original


def test_requests_that_do_not_fit_are_refused() -> None:
    of = attn_dsl.compile("causal")._executable
    with pytest.raises(BindingError, match="`target`: expected sm_80"):
        list(build(of, Request("ninety")))
    with pytest.raises(BindingError, match="`slope`: `causal` has no such float tensor"):
        list(build(of, Request("sm_90", gradients=(frozenset({"slope"}),))))


def test_the_command_line_builds_lists_and_explains(capsys: pytest.CaptureFixture[str]) -> None:
    from attn_dsl.cli import main

    for dim in ("32", "16"):
        arguments = ["build", "noop", "--target", "sm_80", "--dtype", "fp16", "--head-dim", dim, "--forward-only"]
        assert main(arguments) == 0
    assert capsys.readouterr().out.count("attention_forward") == 2
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out.count("noop.attention_forward-") == 2
    assert main(["cache", "why", "noop.attention_forward"]) == 0
    assert "D: 32 there, 16 here" in capsys.readouterr().out
    assert main(["cache", "why", "unknown"]) == 2
    assert main(["cache", "clear"]) == 0
    assert not list(cache.entries())


@pytest.mark.parametrize(
    ("name", "request_"),
    [("head_dims", {"head_dims": 64}), ("head_dim", {"head_dim": -1}), ("target", {"target": 90})],
)
def test_a_request_that_is_none_names_the_field(name: str, request_: dict[str, Any]) -> None:
    with pytest.raises(BindingError, match=f"`{name}`: expected"):
        attn_dsl.compile("causal").build(**request_)
