"""Shipped variants: the evaluator against definitions written by hand in torch, the CPU backend against both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from variant_cases import SHIPPED, Case, cases

import attn_dsl
from attn_dsl.frontend import load
from attn_dsl.ir.evaluate import attention

torch.set_num_threads(1)


@dataclass(frozen=True)
class Call:
    """What a definition sees: logits [B, H, Q, KV], positions q [Q, 1] and k [1, KV], tensors with floats in fp64."""

    case: Case
    score: Tensor
    tensors: dict[str, Tensor]

    @property
    def q(self) -> Tensor:
        return (torch.arange(self.case.sizes.Q) + self.case.sizes.q_offset)[:, None]

    @property
    def k(self) -> Tensor:
        return torch.arange(self.case.sizes.KV)[None, :]

    def integer(self, name: str) -> int:
        return int(self.case.parameters[name])

    def float(self, name: str) -> float:
        return float(self.case.parameters[name])


def everything(c: Call) -> Tensor:
    return torch.ones(c.case.sizes.Q, c.case.sizes.KV, dtype=torch.bool)


def causal(c: Call) -> Tensor:
    return everything(c).tril(c.case.sizes.q_offset)


def causal_window(c: Call) -> Tensor:
    return causal(c) & ~everything(c).tril(c.case.sizes.q_offset - c.integer("window"))


def prefix_lm(c: Call) -> Tensor:
    keep = causal(c).clone()
    keep[:, : c.integer("prefix")] = True
    return keep


def same(labels: Tensor, c: Call) -> Tensor:
    """labels [..., KV] -> [..., Q, KV]: the key carries the query's label."""
    return labels[..., c.q] == labels[..., None, :]


def document(c: Call) -> Tensor:
    return same(c.tensors["doc"], c)[:, None]


def longformer(c: Call) -> Tensor:
    reach, wide = c.integer("reach"), everything(c)
    keep = wide.tril(c.case.sizes.q_offset + reach) & wide.triu(c.case.sizes.q_offset - reach)
    keep[:, : c.integer("globals")] = True
    keep[c.q[:, 0] < c.integer("globals")] = True
    return keep


def bigbird(c: Call) -> Tensor:
    sizes, block, table = c.case.sizes, c.integer("block"), c.tensors["table"]
    rows, columns = table.shape[1], -(-sizes.KV // block)
    blocks = torch.zeros(sizes.H, rows, columns, dtype=torch.bool)
    blocks[:, : c.integer("globals")] = True
    blocks[:, :, : c.integer("globals")] = True
    for row in range(rows):
        blocks[:, row, max(0, row - c.integer("reach")) : row + c.integer("reach") + 1] = True
        blocks[:, row].scatter_(1, table[:, row].long(), True)
    tokens = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)
    return tokens[:, c.q[:, 0], : sizes.KV]


def sparse_strided(c: Call) -> Tensor:
    """The paper's A1 = {max(0, i - l), ..., i} and A2 = {j: (i - j) mod l = 0}, joined."""
    stride = c.integer("stride")
    rows = [[max(0, i - stride) <= j <= i or (j <= i and (i - j) % stride == 0) for j in c.k[0]] for i in c.q[:, 0]]
    return torch.tensor(rows)


def sparse_fixed(c: Call) -> Tensor:
    """The paper's A1 = {j: floor(j / l) = floor(i / l)} and A2 = {j: j mod l in {t, ..., l}}, t = l - c, joined."""
    stride, last = c.integer("stride"), range(c.integer("stride") - c.integer("summary"), c.integer("stride"))
    rows = [[j <= i and (j // stride == i // stride or j % stride in last) for j in c.k[0]] for i in c.q[:, 0]]
    return torch.tensor(rows)


def dilated_window(c: Call) -> Tensor:
    rows = [
        [j in range(i, i - c.integer("window"), -c.integer("dilation")) for j in c.k[0].tolist()]
        for i in c.q[:, 0].tolist()
    ]
    return torch.tensor(rows)


def neighborhood(length: int, r: int) -> Tensor:
    """[length, length]: the 2r + 1 keys around each position, shifted inside at the ends."""
    keep = torch.zeros(length, length, dtype=torch.bool)
    for position in range(length):
        first = min(max(position - r, 0), length - 2 * r - 1)
        keep[position, first : first + 2 * r + 1] = True
    return keep


def natten1d(c: Call) -> Tensor:
    return neighborhood(c.case.sizes.KV, c.integer("r"))[c.q[:, 0]]


def natten2d(c: Call) -> Tensor:
    height, width = (neighborhood(c.integer(axis), c.integer("r")) for axis in ("height", "width"))
    return torch.kron(height.int(), width.int()).bool()[c.q[:, 0]]


def natten3d(c: Call) -> Tensor:
    depth, height, width = (neighborhood(c.integer(a), c.integer("r")) for a in ("depth", "height", "width"))
    return torch.kron(depth.int(), torch.kron(height.int(), width.int())).bool()[c.q[:, 0]]


def shared_prefix(c: Call) -> Tensor:
    keep = same(c.tensors["sample"], c)
    keep[..., : c.integer("prefix")] = True
    return (keep & causal(c))[:, None]


def block_diffusion(c: Call) -> Tensor:
    """The authors' mask over [noised, clean]: block-diagonal, offset block-causal and block-causal parts."""
    n, block = c.integer("length"), c.integer("block")
    q_clean, k_clean = c.q >= n, c.k >= n
    q_block = torch.where(q_clean, c.q - n, c.q) // block
    k_block = torch.where(k_clean, c.k - n, c.k) // block
    diagonal = (q_block == k_block) & (q_clean == k_clean)
    offset_causal = (q_block > k_block) & k_clean & ~q_clean
    block_causal = (q_block >= k_block) & k_clean & q_clean
    return diagonal | offset_causal | block_causal


def tree(c: Call) -> Tensor:
    """Walk up from each query: the parent is the nearest earlier token whose subtree reaches to it."""
    keep = torch.zeros(c.case.sizes.B, 1, c.case.sizes.Q, c.case.sizes.KV, dtype=torch.bool)
    for b, last in enumerate(c.tensors["last"].tolist()):
        for row, position in enumerate(c.q[:, 0].tolist()):
            node: int | None = position
            while node is not None:
                keep[b, 0, row, node] = True
                node = next((k for k in range(node - 1, -1, -1) if last[k] >= node), None)
    return keep


MASKS: dict[str, Callable[[Call], Tensor]] = {
    "causal": causal,
    "alibi": causal,
    "sliding_window": causal_window,
    "prefix_lm": prefix_lm,
    "document": document,
    "packed_causal": lambda c: document(c) & causal(c),
    "longformer": longformer,
    "bigbird": bigbird,
    "sparse_strided": sparse_strided,
    "sparse_fixed": sparse_fixed,
    "dilated_window": dilated_window,
    "hash_buckets": lambda c: same(c.tensors["bucket"], c) & causal(c),
    "natten1d": natten1d,
    "natten2d": natten2d,
    "natten3d": natten3d,
    "shared_prefix": shared_prefix,
    "block_diffusion": block_diffusion,
    "tree": tree,
    "padded": lambda c: c.k < c.tensors["length"][:, None, None, None],
    "gemma2_local": causal_window,
    "gpt_oss": causal_window,
}

SCORES: dict[str, Callable[[Call], Tensor]] = {
    "alibi": lambda c: c.score - c.tensors["slope"][:, None, None] * (c.q - c.k),
    "softcap": lambda c: c.float("cap") * torch.tanh(c.score / c.float("cap")),
    "t5_bias": lambda c: (
        c.score + c.tensors["table"][:, (c.k - c.q).clip(-c.integer("reach"), c.integer("reach")) + c.integer("reach")]
    ),
    "relative_bias": lambda c: c.score + c.tensors["table"].flip(1)[:, c.q - c.k + c.case.sizes.KV - 1],
    "gated_score": lambda c: c.score / (1 + torch.exp(-c.tensors["gate"]))[:, None, None],
    "gemma2_local": lambda c: c.float("cap") * torch.tanh(c.score / c.float("cap")),
}

SINKS: dict[str, Callable[[Call], Tensor]] = {"gpt_oss": lambda c: c.tensors["sinks"]}


def dense(case: Case, query: Tensor, key: Tensor, value: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention from the definitions above: out, log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    key, value = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (key, value))
    call = Call(case, torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(query.shape[-1]), tensors)
    score = SCORES.get(case.name, lambda c: c.score)(call)
    score = score.masked_fill(~MASKS.get(case.name, everything)(call), -torch.inf)
    columns = [score]
    if case.name in SINKS:
        columns.append(SINKS[case.name](call)[None, :, None, None].expand(*score.shape[:3], 1))
    lse = torch.cat(columns, dim=-1).logsumexp(dim=-1)
    weight = torch.exp(score - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    return weight @ value, lse


def leaves(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """query, key, value of `dtype` and the captured tensors, all that are float with gradients switched on."""
    inputs = [x.requires_grad_() for x in case.inputs(dtype=dtype)]
    tensors = {name: t.requires_grad_(t.is_floating_point()) for name, t in case.tensors().items()}
    return inputs, tensors


def gradients(out: Tensor, inputs: list[Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of a random functional of the output; zero where nothing depends on a tensor."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = [*inputs, *(t for t in tensors.values() if t.requires_grad)]
    return list(torch.autograd.grad((out.double() * weight).sum(), wanted, materialize_grads=True))


def test_every_shipped_variant_has_cases() -> None:
    assert {case.name for case in cases()} == set(SHIPPED)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_evaluator_agrees_with_definition_by_hand(case: Case) -> None:
    inputs, tensors = leaves(case, torch.float64)
    double = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    expected, expected_lse = dense(case, *inputs, double)
    bindings = {**case.parameters, **tensors}
    out, lse = attention(load(case.name), *inputs, q_offset=case.sizes.q_offset, bindings=bindings)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, inputs, tensors), gradients(expected, inputs, tensors))


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.id)
def test_cpu_backend_agrees_with_evaluator(case: Case) -> None:
    inputs, tensors = leaves(case, torch.float32)
    bindings = {**case.parameters, **tensors}
    expected, expected_lse = attention(load(case.name), *inputs, q_offset=case.sizes.q_offset, bindings=bindings)
    attend = attn_dsl.compile(case.name, **case.constants)
    out, lse = attend(*inputs, q_offset=case.sizes.q_offset, return_lse=True, **case.arguments, **tensors)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    found, wanted = gradients(out, inputs, tensors), gradients(expected, inputs, tensors)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def t5_bucket(distance: Tensor) -> Tensor:
    """`relative_position_bucket` of the T5 code, bidirectional, 32 buckets, maximum distance 128; distance = k - q."""
    side, far = (distance > 0) * 16, distance.abs()
    logarithmic = 8 + (torch.log(far.clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    return side + torch.where(far < 8, far, logarithmic.clamp(max=15))


def test_t5_bias_table_holds_every_bucket_of_t5() -> None:
    """The page's claim: a gather turns a T5 table of 32 buckets into the variant's table, with its gradient."""
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randn(32, 2, dtype=torch.float64, generator=generator).requires_grad_()
    query, key, value = (torch.randn(1, 2, 300, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    table = buckets[t5_bucket(torch.arange(-128, 129))].T
    out, _ = attention(load("t5_bias"), query, key, value, bindings={"table": table})
    position = torch.arange(300)
    bias = buckets[t5_bucket(position[None, :] - position[:, None])].permute(2, 0, 1)
    expected = torch.softmax(query @ key.transpose(-1, -2) / 2 + bias, dim=-1) @ value
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad((x**2).sum(), buckets)[0] for x in (out, expected))
    torch.testing.assert_close(found, wanted)
