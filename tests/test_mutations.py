"""Texts that slips of the hand make of good ones: each is refused in the language's terms, or proves, prints, runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import attn_dsl
from attn_dsl import AttnError
from attn_dsl.ir.nodes import Size
from attn_dsl.ir.types import Type
from attn_dsl.ir.variant import Nondecreasing

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "attn_dsl" / "variants").glob("*.attn"), *(ROOT / "examples").glob("*.attn")])
TEXTS = ["".join(line for line in file.read_text().splitlines(True) if line[0] != "#") for file in FILES]
TOKEN = re.compile(r"[A-Za-z_]\w*|\d+\.?\d*|\*\*|//|[=<>!]=|\.\.|\s+|\S")
KINDS = (
    ("+", "-", "*", "//", "%", "**"), ("<", "<=", ">", ">=", "==", "!="), ("and", "or"), ("min", "max"),
    ("q", "k", "h", "b", "hk", "Q", "KV", "H", "0", "1", "2", "7", "(q - k)", "(k // h)", "(q % k)"),
    ("abs", "sign", "floor", "sqrt", "tanh", "exp", "log1p", "sigmoid"), ("mask", "score", "sink"), ("let", "def"),
    ("int32", "uint8", "bool", "float32", "float16"),
)  # fmt: skip
SECONDS = 20
"""Of one text, on a machine that does other things too."""


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from([text for text in TEXTS if "=" in text]))
    for _ in range(draw(st.integers(1, 4))):
        tokens = TOKEN.findall(text)
        i = draw(st.sampled_from([i for i, token in enumerate(tokens) if any(token in kind for kind in KINDS)]))
        tokens[i] = draw(st.sampled_from(next(kind for kind in KINDS if tokens[i] in kind)))
        text = "".join(tokens)
    return text


def bindings(attend: attn_dsl.Attention, sizes: dict[str, int]) -> dict[str, Any]:
    """Something for every argument, in the shapes that the text asks for."""
    found: dict[str, Any] = {}
    for parameter in attend.variant.parameters:
        some = {Type.INT: 3, Type.FLOAT: 0.5, Type.BOOL: True}[parameter.type]
        found[parameter.name] = some if parameter.default is None else parameter.default
    for tensor in attend.variant.tensors:
        sizes.update({x.name: 5 for x in tensor.extents if isinstance(x, Size) and x.name not in sizes})
    values = tuple(sizes[name] if name in sizes else found[name] for name in attend._binder.scalars)
    try:
        extents = attend._binder.extents(values)
    except ZeroDivisionError:  # which a call refuses before it asks for extents
        assume(False)
    for tensor, shape in zip(attend.variant.tensors, extents, strict=True):
        assume(all(0 <= size <= 4096 for size in shape))
        made = torch.randint(0, 3, shape)
        for promise in tensor.promises:
            made = made.sort(dim=promise.axis).values if isinstance(promise, Nondecreasing) else made
        found[tensor.name] = made.to(getattr(torch, tensor.dtype.value))
    return found


@given(mutated())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_mutated_text_is_refused_or_computes(text: str) -> None:
    start = time.process_time()
    try:
        attend = attn_dsl.compile(text)
        assert attend.source() and attend.source("cuda")
        query, key = torch.randn(2, 4, 33, 8, requires_grad=True), torch.randn(2, 2, 40, 8)
        given = bindings(attend, {"B": 2, "H": 4, "HK": 2, "Q": 33, "KV": 40, "D": 8})
        numbers = {p.name: given[p.name] for p in attend.variant.parameters if p.name != "block"}
        assert attend.prove(33, 40, block=(16, 16), **numbers).text()
        out = attend(query, key, key, validate=True, **given)
        if out.requires_grad:
            out.sum().backward()
    except AttnError as refusal:
        assert str(refusal)
    assert time.process_time() - start < SECONDS
