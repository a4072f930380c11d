"""Attention inside PyTorch: registered operators, compiled and exported graphs, autocast, checkpoints, modes."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import attn_dsl
from attn_dsl.errors import BindingError

BIAS = """attention bias(reach: int = 3, cap: float = 5.0, causal: bool = true)
tensor table: float32[H, 2 * reach + 1]
score = cap * tanh((score + table[h, clamp(k - q, -reach, reach) + reach]) / cap)
mask = q >= k or not causal
"""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def bias() -> attn_dsl.Attention:
    return attn_dsl.compile(BIAS)


def inputs(rows: int = 9, keys: int = 9, grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, 5), (4, 7))
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype if x.dim() == 4 else x.dtype).requires_grad_(grad) for x in found]


def test_the_operators_pass_opcheck(bias: attn_dsl.Attention) -> None:
    program = bias._executable
    query, key, value, table = inputs()
    cap = torch.tensor(5.0, requires_grad=True)
    options = attn_dsl.backend.select.options(query.device).text
    for arguments in (
        (query, key, value, [table], [cap], [0, 3, 1], [0.3], None, "itb", program.text, options),
        (query, key, value, [table], [], [0, 3, 1], [0.3, 5.0], None, "ifb", program.text, options),
        (query, key, value, [table], [], [0, 3, 0], [0.3, 5.0], torch.tensor([0, 4]), "ifb", program.text, options),
    ):
        torch.library.opcheck(torch.ops.attn_dsl.attention.default, arguments)


def test_a_compiled_module_is_one_graph_with_the_same_results_and_gradients(bias: attn_dsl.Attention) -> None:
    def loss(query: Tensor, key: Tensor, value: Tensor, table: Tensor, cap: Tensor) -> Tensor:
        out, lse = bias(query, key, value, table=table, cap=cap, return_lse=True)
        return out.sin().sum() + lse.cos().sum()

    leaves = [*inputs(), torch.tensor(4.0, requires_grad=True)]
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        torch.autograd.grad(whole(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_inductor_compiles_it(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs(grad=False)

    def model(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return bias(query * 2, key, value, table=table).relu()

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(query, key, value), model(query, key, value))


def test_new_lengths_and_parameters_do_not_recompile_a_graph(bias: attn_dsl.Attention) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def model(query: Tensor, key: Tensor, value: Tensor, table: Tensor, reach: int, cap: float, start: int) -> Tensor:
        return bias(query, key, value, table=table, reach=reach, cap=cap, q_offset=start)

    whole = torch.compile(model, fullgraph=True, backend=counter)
    for n in range(2, 22):
        query, key, value, _ = inputs(rows=n, keys=2 * n + 1, grad=False)
        table = torch.randn(4, 2 * n + 1)
        arguments = (query, key, value, table, n, 3.0 + n / 8, n + 1)
        torch.testing.assert_close(whole(*arguments), model(*arguments))
    assert counter.frame_count <= 3, "one for the first call, at most two until what changes is known"


def test_a_graph_refuses_what_does_not_fit(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs(grad=False)
    with pytest.raises(Exception, match=r"`table`: expected 7 elements on axis 1"):
        torch.compile(lambda q: bias(q, key, value, table=table[:, 1:]), backend="aot_eager")(query)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("`rech`: `bias` has no such argument", lambda attn, x, t: attn(x, x, x, table=t, rech=3)),
        (
            "`reach`: expected a number in a compiled graph",
            lambda attn, x, t: attn(x, x, x, table=t, reach=x.sum().int()),
        ),
        ("`validate`: expected False in a compiled graph", lambda attn, x, t: attn(x, x, x, table=t, validate=True)),
        (
            "`longest_query`: expected an int in a compiled",
            lambda attn, x, t: attn.varlen(x[0], x[0], x[0], t, table=t),
        ),
    ],
)
def test_a_graph_names_what_it_cannot_take(bias: attn_dsl.Attention, says: str, call: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 9, 4, 8)
    table = torch.tensor([0, 9]) if "longest" in says else torch.randn(4, 7)
    with pytest.raises(Exception, match=says):
        torch.compile(lambda x: call(bias, x, table), backend="aot_eager", fullgraph=True)(x)


def test_float64_is_refused_on_a_gpu_before_any_kernel(bias: attn_dsl.Attention) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        FakeTensorMode(),
        pytest.raises(BindingError, match=r"`query`: expected dtype float32, bfloat16 or float16 on"),
    ):
        query = torch.empty(1, 4, 8, 16, dtype=torch.float64, device="cuda")
        bias(query, query, query, table=torch.empty(4, 7, device="cuda"))


class Model(torch.nn.Module):
    def __init__(self, attention: attn_dsl.Attention, table: Tensor) -> None:
        super().__init__()
        self.attention, self.table = attention, torch.nn.Parameter(table)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value, table=self.table)


def test_an_exported_program_runs_in_a_process_that_never_saw_the_text(
    bias: attn_dsl.Attention, tmp_path: Path
) -> None:
    *short, table = inputs(grad=False)
    model = Model(bias, table)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({2: length}, {2: length}, {2: length})
    exported = torch.export.export(model, tuple(short), dynamic_shapes=shapes)
    longer = inputs(31, 31, grad=False)[:3]
    expected = model(*longer).detach()
    torch.export.save(exported, tmp_path / "model.pt2")
    torch.save((longer, expected), tmp_path / "expected.pt")
    script = (
        "import torch, attn_dsl.backend.operators\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(torch.export.load('model.pt2').module()(*inputs), expected)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_autocast_does_what_it_does_to_sdpa(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = bias(query, key, value, table=table, return_lse=True)
        peer = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        compiled = torch.compile(bias, fullgraph=True, backend="aot_eager")(query, key, value, table=table)
        double = bias(query.double(), key.double(), value.double(), table=table)
    assert out.dtype is peer.dtype is compiled.dtype is torch.bfloat16
    assert lse.dtype is torch.float32 and double.dtype is torch.float64
    out.float().sum().backward()
    assert query.grad is not None and query.grad.dtype is torch.float32 and table.grad is not None


def test_activation_checkpoints_give_the_same_gradients(bias: attn_dsl.Attention) -> None:
    *leaves, table = inputs()
    model = Model(bias, table.detach())
    expected = torch.autograd.grad(model(*leaves).sum(), [*leaves, model.table])
    for reentrant in (False, True):
        model.zero_grad()
        for leaf in leaves:
            leaf.grad = None
        checkpoint(model, *leaves, use_reentrant=reentrant).sum().backward()
        for leaf, grad in zip([*leaves, model.table], expected, strict=True):
            torch.testing.assert_close(leaf.grad, grad)


def test_nothing_is_saved_without_gradients(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert bias(query, key, value, table=table).grad_fn is None
        frozen = [x.detach() for x in (query, key, value, table)]
        assert bias(*frozen[:3], table=frozen[3]).grad_fn is None
        assert not saved
        bias(query, key, value, table=table)
        assert saved


def test_only_wanted_gradients_are_made(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs(grad=False)
    table.requires_grad_()
    (grad,) = torch.autograd.grad(bias(query, key, value, table=table).sum(), table)
    everything = inputs()
    expected = torch.autograd.grad(bias(*everything[:3], table=everything[3]).sum(), everything[3])[0]
    torch.testing.assert_close(grad, expected)


def test_a_second_derivative_raises(bias: attn_dsl.Attention) -> None:
    query, key, value, table = inputs()
    for attention in (bias, torch.compile(bias, fullgraph=True, backend="eager")):
        out = attention(query, key, value, table=table)
        (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
            grad.sum().backward()


def test_fake_tensors_pass_through_without_any_work(bias: attn_dsl.Attention) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = (torch.empty(1, 2, 2**20, 64, dtype=torch.bfloat16) for _ in range(3))
        out, lse = bias(query, key, value, table=torch.empty(2, 7), return_lse=True)
    assert out.shape == query.shape and out.dtype is torch.bfloat16 and lse.dtype is torch.float32


def test_a_mode_sees_the_operator(bias: attn_dsl.Attention) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    query, key, value, table = inputs(grad=False)
    expected = bias(query, key, value, table=table)
    with Watch():
        torch.testing.assert_close(bias(query, key, value, table=table), expected)
    assert "attn_dsl.attention.default" in seen


def test_the_operator_and_a_direct_call_agree(bias: attn_dsl.Attention) -> None:
    def run(attention: attn_dsl.Attention) -> tuple[Tensor, ...]:
        leaves = inputs()
        cap = torch.tensor(4.0, requires_grad=True)
        offset = torch.tensor([0, 3])
        out = attention(*leaves[:3], table=leaves[3], cap=cap, q_offset=offset)
        return out, *torch.autograd.grad(out.sin().sum(), [*leaves, cap])

    for a, b in zip(run(torch.compile(bias, fullgraph=True, backend="eager")), run(bias), strict=True):
        torch.testing.assert_close(a, b)


def test_a_saved_module_keeps_its_attention(bias: attn_dsl.Attention) -> None:
    *leaves, table = inputs(grad=False)
    model = Model(bias, table)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Model(attn_dsl.compile(BIAS), torch.zeros_like(table))
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(*leaves), model(*leaves))


def test_misuse_is_an_error_before_any_work(bias: attn_dsl.Attention) -> None:
    query, key, value, _ = inputs(grad=False)
    with pytest.raises(BindingError, match="`table`"):
        bias(query, key, value)


@pytest.mark.parametrize("name", ["t5_bias", "packed_causal", "sliding_window", "hash_buckets"])
def test_the_default_device_is_nobody_elses(name: str) -> None:
    attend = attn_dsl.compile(name)
    query = torch.randn(1, 2, 70, 8, requires_grad=True)
    table = torch.zeros(2, 257, requires_grad=True)
    numbers = torch.arange(70, dtype=torch.int32) // 30
    bindings = {"doc": numbers[None], "bucket": numbers.expand(1, 2, 70), "table": table}
    given = {tensor.name: bindings[tensor.name] for tensor in attend.variant.tensors}
    leaves = [query, table] if name == "t5_bias" else [query]
    with torch.device("meta"):
        out = attend(query, query, query, kv_len=60, validate=True, **given)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        report = attend.prove(70, 70, **given)
        assert attend.explain(query, query, query, **given)
    expected = attend(query, query, query, kv_len=60, **given)
    assert torch.equal(out, expected)
    for mine, other in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        assert torch.equal(mine, other)
    assert report.json() == attend.prove(70, 70, **given).json()
