"""Attention under the transforms of `torch.func`, and what has no derivative: refused, never lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import attn_dsl

BIAS = """attention bias(reach: int = 3, cap: float = 5.0)
tensor table: float32[H, 2 * reach + 1]
score = cap * tanh((score + table[h, clamp(k - q, -reach, reach) + reach]) / cap)
mask = q >= k
"""
BIASED, CAUSAL = attn_dsl.compile(BIAS), attn_dsl.compile("causal")


def inputs(*lead: int) -> list[Tensor]:
    """query, key, value and table, each with the axes `lead` before its own."""
    make = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 5), (4, 7))
    return [torch.randn((*lead, *shape), generator=make) for shape in shapes]


def loss(query: Tensor, key: Tensor, value: Tensor, table: Tensor, cap: Tensor | float = 5.0) -> Tensor:
    out, lse = BIASED(query, key, value, table=table, cap=cap, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def test_grad_is_what_backward_gives() -> None:
    leaves = [*inputs(), torch.tensor(4.0)]
    found = grad(loss, argnums=(0, 1, 2, 3, 4))(*leaves)
    wanted = [x.clone().requires_grad_() for x in leaves]
    for mine, expected in zip(found, torch.autograd.grad(loss(*wanted), wanted), strict=True):
        torch.testing.assert_close(mine, expected)


def test_gradients_of_each_sample_are_those_of_single_calls() -> None:
    query, key, value, table = inputs(3)
    found = vmap(grad(loss, argnums=(0, 3)), in_dims=(0, 0, 0, None))(query, key, value, table[0])
    for i in range(3):
        expected = grad(loss, argnums=(0, 3))(query[i], key[i], value[i], table[0])
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[i], other)


@pytest.mark.parametrize("dim", [0, 2])
def test_vmap_maps_any_axis_of_any_argument(dim: int) -> None:
    query, key, value, table = inputs(3)
    starts = torch.tensor([[0, 1], [2, 0], [4, 4]])
    lengths = torch.tensor([[3, 1], [9, 0], [4, 4]])

    def attend(query: Tensor, table: Tensor, start: Tensor, length: Tensor) -> Tensor:
        return BIASED(query, key[0], value[0], table=table, q_offset=start, kv_len=length)

    found = vmap(attend, in_dims=(dim, 0, 0, 0))(query.movedim(0, dim), table, starts, lengths)
    for i in range(3):
        torch.testing.assert_close(found[i], attend(query[i], table[i], starts[i], lengths[i]))


def test_jacobians_of_both_ways_of_reverse_mode_agree() -> None:
    query, key, value, _ = inputs()

    def sums(query: Tensor) -> Tensor:
        return CAUSAL(query, key, value).sum((0, 2))

    expected = torch.autograd.functional.jacobian(sums, query)
    torch.testing.assert_close(jacrev(sums)(query), expected)
    torch.testing.assert_close(vjp(sums, query)[1](torch.ones(4, 5))[0], expected.sum((0, 1)))


FORWARD: list[Callable[[Callable[[Tensor], Tensor], Tensor], object]] = [
    lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    lambda f, x: jacfwd(f)(x),
    lambda f, x: torch.func.hessian(f)(x),
]


@pytest.mark.parametrize("transform", FORWARD)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_forward_mode_is_refused_and_never_zero(
    transform: Callable[[Callable[[Tensor], Tensor], Tensor], object], place: int
) -> None:
    leaves = inputs()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        transform(lambda x: loss(*leaves[:place], x, *leaves[place + 1 :]), leaves[place])


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_dual_tensors_are_refused(place: int) -> None:
    leaves = inputs()
    with forward_ad.dual_level():
        leaves[place] = forward_ad.make_dual(leaves[place], torch.ones_like(leaves[place]))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            loss(*leaves)


def test_a_second_derivative_is_refused_where_the_first_gradient_was_constant() -> None:
    query, key, value, _ = inputs()
    query.requires_grad_()
    (first,) = torch.autograd.grad(CAUSAL(query, key, value).sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.square().sum().backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(lambda y: CAUSAL(y, key, value).sum())(x).square().sum())(query.detach())


def test_batched_gradients_of_the_old_kind_are_refused() -> None:
    query, key, value, _ = inputs()
    query.requires_grad_()
    out = CAUSAL(query, key, value)
    with pytest.raises(NotImplementedError, match="use jacrev or vmap"):
        torch.autograd.grad(out, query, torch.randn(3, *out.shape), is_grads_batched=True)
