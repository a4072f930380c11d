"""The public API: calls, answers about them, and one clear error for every misuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_dsl
from attn_dsl.errors import BindingError, CompileError

torch.set_num_threads(1)

TEXT = """attention bias(reach: int = 2, cap: float, strict: bool = false)
tensor table: float32[H, 2 * reach + 1]
tensor doc: int32[B, N] nondecreasing over N
tensor kind: int32[N] in [0, 5)
score = cap * tanh(score / cap) + table[h, clamp(k - q, -reach, reach) + reach]
mask = (q >= k or not strict) and doc[b, q] == doc[b, k] and kind[k] != 4
"""


def arguments(**changes: Any) -> dict[str, Any]:
    """A valid call of TEXT with B=2, H=4, HK=2, 6 queries and keys; `None` leaves an argument out."""
    call: dict[str, Any] = {
        "query": torch.randn(2, 4, 6, 8),
        "key": torch.randn(2, 2, 6, 8),
        "value": torch.randn(2, 2, 6, 3),
        "cap": 20.0,
        "table": torch.randn(4, 5),
        "doc": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]], dtype=torch.int32),
        "kind": torch.zeros(6, dtype=torch.int32),
    }
    call.update(changes)
    return {name: x for name, x in call.items() if x is not None}


@pytest.fixture(scope="module")
def attn() -> attn_dsl.Attention:
    return attn_dsl.compile(TEXT)


def test_a_call_returns_the_output_and_the_log_sum_exp(attn: attn_dsl.Attention) -> None:
    out, lse = attn(**arguments(), return_lse=True)
    assert out.shape == (2, 4, 6, 3) and lse.shape == (2, 4, 6)
    assert torch.equal(attn(**arguments(validate=True)).isfinite(), torch.ones(2, 4, 6, 3, dtype=torch.bool))


F32, I32 = torch.float32, torch.int32
MISUSE: list[tuple[str, dict[str, Any], str]] = [
    # argument, what is passed, what the message says beside its name
    ("query", {"query": [[1.0]]}, "expected a tensor [B, H, Q, D], got list"),
    ("query", {"query": torch.randn(4, 6, 8)}, "expected 4 axes [B, H, Q, D], got 3, shape [4, 6, 8]"),
    ("query", {"query": torch.zeros(2, 4, 6, 8, dtype=I32)}, "expected dtype float32, bfloat16"),
    ("query", {"query": torch.randn(2, 4, 0, 8)}, "expected no empty axis, got shape [2, 4, 0, 8]"),
    (
        "query",
        {"query": torch.randn(2, 4, 6, 8).to_sparse()},
        "expected a dense tensor [B, H, Q, D], got one of layout",
    ),
    ("value", {"value": torch.nested.nested_tensor([torch.randn(2, 6, 3)] * 2)}, "got a nested one"),
    ("key", {"key": torch.randn(2, 2, 6, 8).double()}, "expected dtype float32, that of `query`, got float64"),
    ("key", {"key": torch.randn(2, 2, 6, 8, device="meta")}, "expected device cpu, that of `query`, got meta"),
    ("key", {"key": torch.randn(2, 2, 6, 7)}, "expected head dimension 8, that of `query`, got 7"),
    ("key", {"key": torch.randn(2, 3, 6, 8)}, "expected a number of heads that divides the 4 of `query`, got 3"),
    ("key", {"key": torch.randn(3, 2, 6, 8)}, "expected batch 2, that of `query`, or 1, got 3"),
    ("value", {"value": torch.randn(2, 2, 5, 3)}, "expected length 6, that of `key`, got 5"),
    ("value", {"value": torch.randn(2, 1, 6, 3)}, "expected heads 2, that of `key`, got 1"),
    ("value", {"value": torch.randn(1, 2, 6, 3)}, "expected batch 2, that of `key`, got 1"),
    ("cap", {"cap": None}, "expected a float, got nothing"),
    ("cap", {"cap": "20"}, "expected a float, got '20' (str)"),
    ("cap", {"cap": torch.randn(2)}, "expected a float or a 0-d float tensor, got a float32 tensor of shape [2]"),
    ("cap", {"cap": torch.tensor(3)}, "expected a float or a 0-d float tensor, got a int64 tensor of shape []"),
    ("reach", {"reach": 2.0}, "expected an int, got 2.0 (float)"),
    ("reach", {"reach": True}, "expected an int, got True (bool)"),
    ("cap", {"cap": 10**400}, "expected a float, got 1000"),
    ("reach", {"reach": torch.tensor(2, device="meta")}, "expected device cpu, that of `query`, got meta"),
    ("reach", {"reach": 2**70}, f"expected a 64-bit int, got {2**70}"),
    ("strict", {"strict": 1}, "expected a bool, got 1 (int)"),
    ("table", {"table": None}, "expected a float32 tensor, got nothing"),
    ("table", {"table": 3.0}, "expected a float32 tensor, got float"),
    ("table", {"table": torch.randn(4, 5).double()}, "expected dtype float32, got float64"),
    ("table", {"table": torch.randn(4, 5, 1)}, "expected 2 axes, got 3, shape [4, 5, 1]"),
    ("table", {"table": torch.randn(4, 5).to_sparse()}, "expected a dense tensor, got one of layout sparse_coo"),
    ("table", {"table": torch.randn(4, 7)}, "expected 5 elements on axis 1, got shape [4, 7]"),
    ("table", {"table": torch.randn(2, 5)}, "expected 4 elements (H) on axis 0, got shape [2, 5]"),
    ("table", {"reach": 3}, "expected 7 elements on axis 1, got shape [4, 5]"),
    ("table", {"table": torch.randn(4, 5, device="meta")}, "expected device cpu, that of `query`, got meta"),
    ("kind", {"kind": torch.zeros(7, dtype=I32)}, "expected 6 elements (N, bound by `doc`) on axis 0, got shape [7]"),
    ("doc", {"doc": torch.zeros(1, 6, dtype=I32)}, "expected 2 elements (B) on axis 0, got shape [1, 6]"),
    ("doc", {"doc": torch.zeros(2, 6)}, "expected dtype int32, got float32"),
    ("tabel", {"tabel": torch.randn(4, 5)}, "did you mean `table`?"),
    ("zzz", {"zzz": 1}, "expected `cap`, `doc`, `kind`, `reach`, `strict`, `table`, got `zzz`"),
    ("q_offset", {"q_offset": -1}, "expected an int >= 0 or an int tensor [2] (one for each batch), got -1"),
    ("q_offset", {"q_offset": 1.5}, "got 1.5"),
    ("q_offset", {"q_offset": torch.tensor([1, 2, 3])}, "got shape [3]"),
    ("q_offset", {"q_offset": torch.tensor([1.0, 2.0])}, "got dtype float32"),
    ("q_offset", {"q_offset": torch.tensor([1, -2])}, "got -2"),
    ("scale", {"scale": "1"}, "expected a finite number or None, got '1'"),
    ("scale", {"scale": math.nan}, "expected a finite number or None, got nan"),
    ("scale", {"scale": 10**400}, "expected a finite number or None, got 1000"),
    ("self", {"self": 3}, "`bias` has no such argument"),
    ("schedule", {"schedule": 3}, "expected what `schedule` gave, got int"),
    ("deterministic", {"deterministic": []}, "expected bools, got [], False"),
    ("precise", {"precise": 1}, "expected bools, got False, 1"),
    ("float32_precision", {"float32_precision": ["ieee"]}, "expected ieee or tf32, got ['ieee']"),
]


@pytest.mark.parametrize(("name", "changes", "says"), MISUSE, ids=lambda x: x if isinstance(x, str) else "")
def test_misuse_is_one_error_that_names_argument_expected_and_got(
    attn: attn_dsl.Attention, name: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(BindingError) as error:
        attn(**arguments(**changes))
    assert f"`{name}`" in str(error.value) and says in str(error.value)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    x = torch.randn(1, 1, 5, 4)
    attn = attn_dsl.compile("sliding_window")
    found = attn(
        x, x, x, window=numpy.int32(3), scale=numpy.float32(0.5), q_offset=numpy.int64(1), kv_len=numpy.int8(4)
    )
    assert torch.equal(found, attn(x, x, x, window=3, scale=0.5, q_offset=1, kv_len=4))


OTHERS: list[tuple[str, Callable[[attn_dsl.Attention], object]]] = [
    ("q_len", lambda attn: attn.prove("8", 8)),
    ("kv_len", lambda attn: attn.prove(8, 8.0)),
    ("q_offset", lambda attn: attn.prove(8, 8, q_offset=-1)),
    ("block", lambda attn: attn.prove(8, 8, block=4)),
    ("block", lambda attn: attn.prove(8, 8, block=(4, 0))),
    ("doc", lambda attn: attn.prove(8, 8, doc=[0] * 8)),
    ("doc", lambda attn: attn.prove(8, 8, doc=torch.zeros(8, dtype=I32))),
    ("doc", lambda attn: attn.prove(8, 8, doc=torch.zeros(1, 7, dtype=I32))),
    ("B", lambda attn: attn.cost("1", 1, 1, 1, 1)),
    ("Q", lambda attn: attn.cost(1, 1, 0, 1, 1)),
    ("HK", lambda attn: attn.cost(1, 4, 1, 1, 1, HK=3)),
    ("DV", lambda attn: attn.cost(1, 4, 1, 1, 1, DV=0)),
    ("dtype", lambda attn: attn.cost(1, 4, 1, 1, 1, dtype="float32")),
    ("block", lambda attn: attn.cost(1, 4, 1, 1, 1, block=(0, 0))),
    ("q_offset", lambda attn: attn.cost(1, 4, 1, 1, 1, q_offset=-1)),
    ("device", lambda attn: attn.source("tpu")),
    ("dtype", lambda attn: attn.source(dtype=torch.int8)),
    ("dtype", lambda attn: attn.source("cuda", torch.float64)),
    ("which", lambda attn: attn.source("cuda", which="both")),
    ("part", lambda attn: attn_dsl.merge([torch.ones(1)])),
    ("source", lambda attn: attn_dsl.compile(None)),
    ("query", lambda attn: attn.varlen(torch.randn(9, 4), torch.randn(9, 4), torch.randn(9, 4), torch.tensor([0, 9]))),
    ("q_offset", lambda attn: attn.varlen(*[torch.randn(9, 4, 8)] * 3, torch.tensor([0, 9]), q_offset=3)),
]


@pytest.mark.parametrize(("name", "call"), OTHERS, ids=lambda x: x if isinstance(x, str) else "")
def test_other_methods_name_the_argument_too(name: str, call: Callable[[attn_dsl.Attention], object]) -> None:
    attn = attn_dsl.compile("attention plain\ntensor doc: int32[B, KV]\nmask = doc[b, q] == doc[b, k]\n")
    with pytest.raises(BindingError, match=name) as error:
        call(attn)
    assert f"mean `{name}`" not in str(error.value)


def test_an_argument_may_be_called_self() -> None:
    x = torch.randn(1, 1, 5, 4)
    attn = attn_dsl.compile("attention a(self: int)\nmask = 0 <= q - k < self\n")
    assert torch.equal(attn(x, x, x, self=2), attn_dsl.compile("sliding_window")(x, x, x, window=2))
    assert attn.prove(8, 8, self=2).kept == 15


def test_lengths_past_all_counting_are_a_note_and_not_a_wait() -> None:
    report = attn_dsl.compile("causal").prove(10**15, 10**15)
    assert report.tiles is None and "tiles are not counted" in report.notes[0]


def test_a_divisor_that_comes_out_as_zero_is_refused() -> None:
    with pytest.raises(BindingError, match="`zero` divides by 0"):
        attn_dsl.compile("attention zero\nmask = q // (KV % 1) >= k\n")


COPIES: list[Callable[[Any], Any]] = [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_compute_the_same(copied: Callable[[Any], Any], attn: attn_dsl.Attention) -> None:
    torch.manual_seed(0)
    call = arguments()
    assert torch.equal(copied(attn)(**call), attn(**call))
    baked = attn_dsl.compile("attention w(const window: int, n: int)\nmask = 0 <= q - k < window + n\n", window=3, n=1)
    x = torch.randn(1, 2, 9, 4)
    assert torch.equal(copied(baked)(x, x, x), baked(x, x, x))
    module = torch.nn.Module()
    module.attend = attn
    assert torch.equal(copied(module).attend(**call), attn(**call))


@pytest.mark.parametrize("copied", COPIES)
def test_errors_can_be_sent_to_another_process(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(CompileError) as error:
        attn_dsl.compile("attention a\nmask = z\nscore = y\n")
    assert str(copied(error.value)) == str(error.value)
    assert copied(error.value).diagnostics == error.value.diagnostics


OFFENDERS: list[tuple[str, dict[str, Any], str]] = [
    (
        "doc",
        {"doc": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 1, 2]], dtype=I32)},
        "expected nondecreasing values along axis 1, got 0 after 1 at [1, 2]",
    ),
    ("kind", {"kind": torch.tensor([0, 1, 5, 9, 0, 0], dtype=I32)}, "expected values in [0, 5), got 5 at [2]"),
    ("doc", {"q_offset": 1}, "index 6 is out of range for axis 1 of `doc`"),
]


@pytest.mark.parametrize(("name", "changes", "says"), OFFENDERS, ids=lambda x: x if isinstance(x, str) else "")
def test_validate_names_the_first_offender(
    attn: attn_dsl.Attention, name: str, changes: dict[str, Any], says: str
) -> None:
    attn(**arguments(**changes))
    with pytest.raises(BindingError) as error:
        attn(**arguments(**changes), validate=True)
    assert f"`{name}`" in str(error.value) and says in str(error.value)


def test_a_divisor_must_be_positive() -> None:
    attn = attn_dsl.compile("attention s(stride: int)\nmask = q % stride == k % stride\n")
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(BindingError, match=r"`stride`: expected a positive number.*got 0"):
        attn(x, x, x, stride=0)


def test_a_divisor_within_a_divisor_must_be_positive() -> None:
    attn = attn_dsl.compile("attention s(width: int, height: int)\nmask = q // (width // height) >= k\n")
    x = torch.randn(1, 1, 4, 4)
    for height, name in ((0, "`height`"), (9, "`width`, `height`")):
        with pytest.raises(BindingError, match=f"{name}: expected a positive .*, got 0"):
            attn(x, x, x, width=4, height=height)


@pytest.mark.parametrize("block", [0, -1])
def test_a_divisor_of_an_extent_must_be_positive(block: int) -> None:
    attn = attn_dsl.compile("attention s(block: int)\ntensor t: float32[KV // block]\nscore = score + t[k // block]\n")
    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(BindingError, match=f"`block`: expected a positive number.*, got {block}"):
        attn(x, x, x, block=block, t=torch.zeros(2))


def test_a_device_without_a_backend_is_an_error() -> None:
    x = torch.randn(1, 1, 4, 4, device="meta")
    with pytest.raises(BindingError, match=r"`query`: expected a tensor on a device with a backend.*got one on meta"):
        attn_dsl.compile("causal")(x, x, x)


@pytest.mark.parametrize("name", ["scale", "query", "validate"])
def test_names_of_call_arguments_are_refused(name: str) -> None:
    with pytest.raises((BindingError, CompileError), match=name):
        attn_dsl.compile(f"attention a({name}: float = 1.0)\nscore = score * {name}\n")


def test_constants_are_baked_or_become_defaults() -> None:
    x = torch.randn(1, 2, 9, 4)
    baked = attn_dsl.compile("attention w(const window: int)\nmask = 0 <= q - k < window\n", window=3)
    default = attn_dsl.compile("sliding_window", window=3)
    torch.testing.assert_close(baked(x, x, x), default(x, x, x))
    torch.testing.assert_close(default(x, x, x, window=9), attn_dsl.compile("causal")(x, x, x))
    with pytest.raises(BindingError, match="window"):
        baked(x, x, x, window=4)
    with pytest.raises(BindingError, match="window"):
        attn_dsl.compile("sliding_window", windw=3)


def test_sources_are_paths_names_and_texts(tmp_path: Path) -> None:
    text = "attention mine\nmask = q >= k\n"
    path = tmp_path / "mine.attn"
    path.write_text(text)
    x = torch.randn(1, 1, 5, 4)
    results = [attn_dsl.compile(source)(x, x, x) for source in (text, path, str(path), "causal")]
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(CompileError):
        attn_dsl.compile("attention mine\nmask = q >> k\n")


def test_a_batch_of_one_key_and_value_is_broadcast() -> None:
    query, key = torch.randn(3, 2, 5, 4), torch.randn(1, 2, 7, 4).requires_grad_()
    attn = attn_dsl.compile("noop")
    out = attn(query, key, key)
    torch.testing.assert_close(out, attn(query, key.expand(3, -1, -1, -1), key.expand(3, -1, -1, -1)))
    out.sum().backward()
    assert key.grad is not None and key.grad.shape == key.shape


def test_numbers_and_tensors_do_as_parameters() -> None:
    query, key, value = (torch.randn(1, 1, 5, 4) for _ in range(3))
    attn = attn_dsl.compile("softcap")
    cap = torch.tensor(3.0, requires_grad=True)
    out = attn(query, key, value, cap=cap)
    torch.testing.assert_close(out, attn(query, key, value, cap=3))
    out.sum().backward()
    assert cap.grad is not None and cap.grad.shape == ()


def test_the_scale_is_that_of_the_logits() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(attn_dsl.compile("noop")(query, key, value, scale=0.3), expected)


def test_explain_says_which_backend_and_tiles_and_why() -> None:
    query, key, value = (torch.randn(1, 2, 1024, 16) for _ in range(3))
    text = attn_dsl.compile("sliding_window", window=128).explain(query, key, value)
    assert "cpu" in text and "never visited" in text and "rows x" in text
    with pytest.raises(BindingError):
        attn_dsl.compile("sliding_window").explain(query, key[:, :, :, :8], value)


def test_cost_counts_dense_against_scheduled() -> None:
    cost = attn_dsl.compile("causal").cost(2, 3, 2048, 2048, 64)
    tiles = 16 * 17 // 2
    assert cost.pairs == 2 * 3 * 2048 * 2048 and cost.visited == 2 * 3 * tiles * 128 * 128
    assert cost.flops == 4 * 64 * cost.visited and cost.flops_dense == 4 * 64 * cost.pairs
    assert cost.memory < cost.memory_dense / 100
    full = attn_dsl.compile("noop").cost(1, 4, 100, 50, 8, HK=2, DV=16)
    assert full.flops == full.flops_dense == 2 * (8 + 16) * 4 * 100 * 50
    with pytest.raises(BindingError, match="`Q`"):
        attn_dsl.compile("noop").cost(1, 1, 0, 5, 8)
    lengths = torch.tensor([128, 0], dtype=torch.int32)
    padded = attn_dsl.compile("padded")
    assert padded.cost(2, 1, 256, 256, 8, length=lengths).visited == 256 * 128
    with pytest.raises(BindingError, match="`length`"):
        padded.cost(2, 1, 256, 256, 8)


def test_prove_counts_tiles() -> None:
    data = attn_dsl.compile("causal").prove(2048, 2048).json()
    assert data["tiles"] == {"empty": 120, "partial": 16, "full": 120}


def test_ir_and_source_show_the_work() -> None:
    attn = attn_dsl.compile("sliding_window")
    assert attn.ir() and attn.ir("simplify") and attn.ir("schedule")
    with pytest.raises(BindingError, match="no pass"):
        attn.ir("nothing")
    source = attn.source()
    assert "def kv_ranges(" in source and "def mask(" in source and "# sliding_window.attn:" in source
    compile(source, "emitted", "exec")
    assert "window=" in repr(attn)


def test_training_a_bias_table_lowers_a_loss() -> None:
    make = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 8, generator=make) for _ in range(3))
    target: Tensor = torch.randn(1, 2, 40, 8, generator=make)
    table = torch.zeros(2, 9, requires_grad=True)
    attn = attn_dsl.compile("t5_bias", reach=4)
    optimizer = torch.optim.Adam([table], lr=0.3)
    losses = []
    for _ in range(15):
        loss = (attn(query, key, value, table=table) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
