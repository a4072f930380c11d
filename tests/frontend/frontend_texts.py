"""Random texts for the fuzz test: damaged variants, token soup, noise. Everything follows from one `random.Random`."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from attn_dsl.frontend.library import SHIPPED

VARIANTS = [path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.attn"))]
PIECES = [re.findall(r"\w+|\s+|[^\w\s]+", text) for text in VARIANTS]
SPELLED = re.findall(
    r"\S+",
    """
    attention import tensor let def const nondecreasing over in if else and or not true false score mask sink
    b h hk q k B H HK Q KV D N x y f int float bool int32 float32 bfloat16 sum min max any all abs clamp floor tanh exp
    relu pow causal sliding_window gpt_oss t5_bias natten2d window torch np where q_idx True lambda return for
    0 1 2 3 -1 7 64 128 1.5 .5 2. 1e9 1e999 9223372036854775807 99999999999999999999 0x10 1_000 2k
    ( ) [ ] , : .. . = == != < <= > >= + - * / // % ** ; & && | || ! ~ ^ -> := ? { } @ \\ ' " # ≤ − é 漢
    """,
)
WORDS = [*SPELLED, "\t", "\n", "\n", "\n"]


def damaged(random: Random) -> str:
    """A shipped variant with some pieces deleted, doubled, swapped, or replaced by words of the language."""
    pieces = list(random.choice(PIECES))
    for _ in range(random.choice([1, 1, 2, 3, 8])):
        i, j = random.randrange(len(pieces)), random.randrange(len(pieces))
        match random.randrange(5):
            case 0:
                pieces[i] = ""
            case 1:
                pieces[i] *= random.choice([2, 2, 3, 70])
            case 2:
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case 3:
                pieces[i] = f" {random.choice(WORDS)} "
            case _:
                pieces[i] += f" {random.choice(WORDS)} {random.choice(WORDS)} "
    return "".join(pieces)


def soup(random: Random) -> str:
    words = [random.choice(WORDS) for _ in range(random.randrange(60))]
    return "attention soup\n" + " ".join(words)


def expression(random: Random, depth: int = 0) -> str:
    """An expression that follows the grammar and mostly no type rule."""
    leaves = ["q", "k", "b", "h", "score", "KV", "1", "2.5", "true", "w", "t[b, k]", "n", "f(q)", "causal.mask()", "0"]
    if depth > 5 or random.random() < 0.2:
        return random.choice(leaves)
    x, y, z = (expression(random, depth + 1) for _ in range(3))
    forms = ["{x} + {y}", "({x}) * ({y})", "{x} - {y} < {z}", "({x}) // ({y})", "{x} ** {y}", "-{x}", "not {x}"]
    forms += [
        "{x} and {y}",
        "({x} if {y} else {z})",
        "clamp({x}, {y}, {z})",
        "min({x}, {y})",
        "tanh({x})",
        "t[{x}, {y}]",
    ]
    forms += ["sum(d in 0..3: {x} + d)", "any(e in {x}..{y}: {z})", "f({x})", "g({x}, {y})", "sliding_window.mask({x})"]
    forms += [
        "softcap.score(cap={x}, score={y})",
        "gpt_oss.sink()",
        "({x}) % {y}",
        "floor({x})",
        "u[{x}]",
        "({x}) == ({y})",
    ]
    return random.choice(forms).format(x=x, y=y, z=z)


def program(random: Random) -> str:
    lines = [
        "attention program(w: int = 3, const n: int = 4, c: float = 2)",
        "import causal, sliding_window, softcap, gpt_oss",
    ]
    lines += [
        "tensor t: float32[B, KV]",
        "tensor u: int32[M] in [0, 100)",
        "def f(x) = x + 1",
        "def g(x, y) = f(x) * y",
    ]
    lines += [f"let a{i} = {expression(random, 3)}" for i in range(random.randrange(3))]
    lines += [f"{part} = {expression(random)}" for part in ("score", "mask", "sink") if random.random() < 0.7]
    return "\n".join(lines)


def spliced(random: Random) -> str:
    first, second = random.choice(VARIANTS), random.choice(VARIANTS)
    return first[: random.randrange(len(first))] + second[random.randrange(len(second)) :]


def characters(random: Random) -> str:
    text = list(random.choice(VARIANTS))
    for _ in range(random.randrange(1, 30)):
        text[random.randrange(len(text))] = chr(
            random.choice([random.randrange(128), random.randrange(0x3000), 0x1F600])
        )
    return "".join(text)


def noise(random: Random) -> str:
    data = random.randbytes(random.randrange(200))
    return random.choice(
        [data.decode("latin-1"), data.decode("utf-8", "replace"), data.decode("utf-8", "surrogateescape")]
    )


def heap(random: Random) -> str:
    """Much of one thing: brackets, signs, powers, doubling definitions."""
    n = random.choice([10, 30, 63, 64, 65, 99, 101, 300, 1000])
    piece = random.choice(
        ["(", "-", "not ", "q + ", "2 ** ", "1 if q > k else ", "t[", "f(", "q < ", "a.", "&", "let x = 1;"]
    )
    tail = random.choice(["q", "", ")" * n, "]" * n])
    if random.random() < 0.2:
        lets = "\n".join(f"let x{i + 1} = x{i} + x{i}" for i in range(n // 10))
        return f"attention heap\nlet x0 = q\n{lets}\nmask = x{n // 10} > 0"
    if random.random() < 0.2:
        defs = "\n".join(f"def f{i + 1}(x) = f{i}(x + 1) * f{i}(x - 1)" for i in range(n // 10))
        return f"attention heap\ndef f0(x) = x\n{defs}\nmask = f{n // 10}(q) > 0"
    return f"attention heap\nmask = {piece * n}{tail}"


KINDS: list[Callable[[Random], str]] = [
    *[damaged] * 12,
    *[soup] * 4,
    *[program] * 3,
    *[spliced] * 3,
    *[characters] * 2,
    *[noise] * 2,
    heap,
]


def text(seed: int) -> str:
    random = Random(seed)
    return random.choice(KINDS)(random)
