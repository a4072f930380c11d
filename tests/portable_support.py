"""Calls of the portable kernels beside the definition of truth, for tests in the interpreter and on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from variant_cases import Case, Value

from attn_dsl.backend import operators
from attn_dsl.backend.execute import Options, Program, program_for
from attn_dsl.frontend import load
from attn_dsl.ir import evaluate
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Variant
from attn_dsl.passes import pipeline


@functools.lru_cache(maxsize=64)
def program_of(text: str, constants: tuple[tuple[str, Value], ...] = ()) -> Program:
    """The program of a shipped name or of a text, `const` parameters bound."""
    return compiled(load(text), dict(constants))


def compiled(variant: Variant, constants: Mapping[str, Value] | None = None) -> Program:
    program = pipeline.run(variant, constants or {})
    return program_for(program.variant, program.proof)


@dataclass
class Result:
    """Outputs and the gradients that were found, by name."""

    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Problem:
    """One call: tensors in the types under test; `bindings` holds parameters and captured tensors."""

    program: Program
    query: Tensor
    key: Tensor
    value: Tensor
    bindings: Mapping[str, Any]
    q_offset: int | Tensor = 0
    scale: float | None = None

    @staticmethod
    def of(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Problem:
        program = program_of(case.name, tuple(case.constants.items()))
        tensors = {name: tensor.to(device) for name, tensor in case.tensors(seed).items()}
        inputs = (x.to(device) for x in case.inputs(seed, dtype))
        return Problem(program, *inputs, {**case.arguments, **tensors}, case.sizes.q_offset)

    @property
    def all_bindings(self) -> dict[str, Any]:
        """With the defaults of parameters."""
        return {**{p.name: p.default for p in self.program.variant.parameters}, **self.bindings}

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(what can take a gradient, by name; all bindings). Float parameters become tensors; `dtype` widens."""

        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype or x.dtype).requires_grad_()

        bindings = self.all_bindings
        found = {"query": leaf(self.query), "key": leaf(self.key), "value": leaf(self.value)}
        for parameter in self.program.variant.parameters:
            if parameter.type is Type.FLOAT and not isinstance(bindings[parameter.name], Tensor):
                bindings[parameter.name] = torch.tensor(float(bindings[parameter.name]), device=self.query.device)
        for name, value in bindings.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                bindings[name] = found[name] = leaf(value)
        return found, bindings

    def portable(self, upstream: tuple[Tensor, Tensor] | None = None, **options: Any) -> Result:
        """By the portable kernels."""
        return self.by("portable", upstream, **options)

    def by(self, backend: str, upstream: tuple[Tensor, Tensor] | None = None, **options: Any) -> Result:
        """By a backend, everything that can take a gradient being ready for one."""
        leaves, bindings = self.leaves()
        inputs = leaves["query"], leaves["key"], leaves["value"]
        call = self.program.binder.bind(*inputs, self.scale, self.q_offset, bindings)
        out, lse = operators.attention(self.program, call, Options(backend, **options))
        return differentiated(out, lse, leaves, upstream)

    def truth(self, upstream: tuple[Tensor, Tensor] | None = None, dtype: torch.dtype = torch.float64) -> Result:
        """By the evaluator, every operation in `dtype`."""
        leaves, bindings = self.leaves(dtype)
        expand = self.query.shape[0]
        out, lse = evaluate.attention(
            self.program.variant,
            leaves["query"],
            leaves["key"].expand(expand, -1, -1, -1),
            leaves["value"].expand(expand, -1, -1, -1),
            scale=self.scale,
            q_offset=self.q_offset,
            bindings=bindings,
            dtype=dtype,
        )
        return differentiated(out, lse, leaves, upstream)

    def upstream(self, seed: int = 7) -> tuple[Tensor, Tensor]:
        """Gradients of the outputs, float64; none for the log-sum-exp of rows that see nothing."""
        generator = torch.Generator().manual_seed(seed)
        batch, heads, rows = self.query.shape[:3]
        out = torch.randn(batch, heads, rows, self.value.shape[3], generator=generator, dtype=torch.float64)
        lse = torch.randn(batch, heads, rows, generator=generator, dtype=torch.float64)
        return out.to(self.query.dtype).double().to(self.query.device), lse.float().double().to(self.query.device)


def differentiated(
    out: Tensor, lse: Tensor, leaves: dict[str, Tensor], upstream: tuple[Tensor, Tensor] | None
) -> Result:
    result = Result(out.detach(), lse.detach())
    if upstream is not None:
        grad_out, grad_lse = upstream
        grad_lse = torch.where(lse.isinf(), 0.0, grad_lse)
        pairs = [(x, g.to(x.dtype)) for x, g in ((out, grad_out), (lse, grad_lse)) if x.requires_grad]
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
        result.grads = {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), found, strict=True)
        }
    return result


def assert_close(found: Result, truth: Result, tolerance: float) -> None:
    """Everything within `tolerance` of the largest true magnitude (at least 1); nothing is nan."""
    named = {"out": (found.out, truth.out), "lse": (found.lse, truth.lse)}
    named.update({f"grad of {name}": (grad, truth.grads[name]) for name, grad in found.grads.items()})
    for name, (a, b) in named.items():
        assert a.shape == b.shape, name
        infinite = b.isinf()
        assert torch.equal(a.isinf(), infinite), f"{name}: infinities differ"
        error = torch.where(infinite, 0.0, a.double() - b.double()).abs().max().item()
        largest = max(1.0, torch.where(infinite, 0.0, b).abs().max().item())
        assert error <= tolerance * largest, f"{name}: error {error:.3g} of {largest:.3g}"
