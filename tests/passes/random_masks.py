"""Random masks by seed, so that a failure is reproduced by its number."""

from __future__ import annotations

import random
from dataclasses import dataclass

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    K,
    Node,
    Param,
    Q,
    Score,
    Select,
    Size,
    Unary,
    UnaryOp,
)
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Parameter, Variant

PARAMETERS = (Parameter("a", Type.INT), Parameter("w", Type.INT), Parameter("flag", Type.BOOL))
A, W = (Param(p.name, p.type) for p in PARAMETERS[:2])
FLAG = Param("flag", Type.BOOL)


@dataclass
class RandomMask:
    """Draws a mask over q, k, an int `a` of any sign, an int `w` >= 1 (the divisors) and a bool `flag`."""

    rng: random.Random

    def variant(self, kind: str) -> Variant:
        """kind "affine": a conjunction of affine comparisons; "boolean": any formula; "general": all operators."""
        mask = self.conjunction() if kind == "affine" else self.formula(3, kind == "general")
        return Variant(f"random_{kind}", PARAMETERS, (), Score(), mask)

    def conjunction(self) -> Node:
        mask = self.comparison(self.affine())
        for _ in range(self.rng.randrange(3)):
            mask = Binary(BinaryOp.AND, mask, self.comparison(self.affine()))
        return mask

    def formula(self, depth: int, general: bool) -> Node:
        if depth == 0 or self.rng.random() < 0.3:
            if general and self.rng.random() < 0.1:
                return FLAG
            return self.comparison(self.term(2) if general else self.affine())
        x = self.formula(depth - 1, general)
        match self.rng.randrange(5):
            case 0:
                return Unary(UnaryOp.NOT, x)
            case 1 if general:
                return Select(self.formula(1, general), x, self.formula(depth - 1, general))
            case 2 | 3:
                return Binary(BinaryOp.AND, x, self.formula(depth - 1, general))
            case _:
                return Binary(BinaryOp.OR, x, self.formula(depth - 1, general))

    def comparison(self, term: Node) -> Node:
        ops = [CompareOp.GE, CompareOp.LE, CompareOp.GT, CompareOp.LT, CompareOp.EQ, CompareOp.NE]
        op = self.rng.choices(ops, weights=(4, 4, 3, 3, 1, 1))[0]
        return Compare(op, term, self.constant())

    def constant(self) -> Node:
        return self.rng.choice([A, W, Size("KV"), *(Const(self.rng.randint(-6, 14)) for _ in range(5))])

    def affine(self) -> Node:
        """x*q + y*k + c, mostly with coefficients of magnitude 1."""
        x, y = (self.rng.choice((-1, 1, 1, -1, 0, 2, -2, 3)) for _ in range(2))
        total: Node = self.constant()
        for coefficient, position in ((x, Q), (y, K)):
            if coefficient:
                total = Binary(BinaryOp.ADD, total, Binary(BinaryOp.MUL, Const(coefficient), position))
        return total

    def term(self, depth: int) -> Node:
        if depth == 0 or self.rng.random() < 0.2:
            return self.rng.choice([Q, K, Q, K, self.constant(), self.affine()])
        x, y = self.term(depth - 1), self.term(depth - 1)
        match self.rng.randrange(11):
            case 0:
                return Binary(BinaryOp.FLOORDIV, x, self.divisor())
            case 1:
                return Binary(BinaryOp.MOD, x, self.divisor())
            case 2:
                return Binary(BinaryOp.MIN, x, y)
            case 3:
                return Binary(BinaryOp.MAX, x, self.constant())
            case 4:
                return Binary(BinaryOp.MIN, Binary(BinaryOp.MAX, x, self.constant()), self.constant())
            case 5:
                return Unary(UnaryOp.ABS, x)
            case 6:
                return Unary(UnaryOp.SIGN, x)
            case 7:
                return Select(self.comparison(self.affine()), x, y)
            case 8:
                return Binary(BinaryOp.MUL, x, self.rng.choice([A, W, Const(2), Const(-1)]))
            case 9:
                return Binary(BinaryOp.SUB, x, y)
            case _:
                return Binary(BinaryOp.ADD, x, y)

    def divisor(self) -> Node:
        return self.rng.choice([W, Const(2), Const(3), Const(5), W])
