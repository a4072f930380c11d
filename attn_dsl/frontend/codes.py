"""Every error code: its title, what it means, a text that has the error and one that has not."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

_SHOWN = 100


@dataclass(frozen=True)
class Entry:
    """`beside` are files next to the wrong example, by name."""

    title: str
    explanation: str
    wrong: str
    right: str
    beside: Mapping[str, str] = field(default_factory=dict)


def explain(code: str) -> str:
    """The long explanation of a code; raises `KeyError` where there is no such code."""
    entry = CODES[code]
    files = [f"# {name}.attn\n{text}" for name, text in list(entry.beside.items())[:2]]
    wrong = "\n\n".join([entry.wrong, *files])
    paragraphs = [f"{code}: {entry.title}", textwrap.fill(entry.explanation, 90)]
    paragraphs += ["Wrong:", _indented(wrong), "Right:", _indented(entry.right)]
    return "\n\n".join(paragraphs)


def _indented(text: str) -> str:
    lines = (line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…" for line in text.splitlines())
    return textwrap.indent("\n".join(lines), "    ")


def _causal(*lines: str) -> str:
    return "\n".join(["attention example", *lines])


_CHAIN = {f"step{i}": f"attention step{i}\nimport step{i + 1}" for i in range(1, 20)}
_CYCLE = {"first": "attention first\nimport second", "second": "attention second\nimport first"}

CODES: dict[str, Entry] = {
    # Reading the text
    "E000": Entry(
        "there is no text to compile",
        "A source is a path that ends in `.attn`, the name of a shipped variant, or a text. The file must "
        "exist, be a regular file of UTF-8 text and keep the size limit.",
        "causl",
        "causal",
    ),
    "E001": Entry(
        "a statement does not follow the grammar",
        "A statement ends with its line or at `;`. An expression goes on over line ends only inside "
        "brackets. The message says what could have stood at the caret.",
        _causal("mask = q >= k and"),
        _causal("mask = (q >= k and", "        q - k < 128)"),
    ),
    "E002": Entry(
        "a character that means nothing here",
        "Outside comments, a text is made of ASCII letters, digits and the operators of the language. There "
        "are no strings. Typographic operators are answered with their spelling here.",
        _causal("mask = q ≥ k"),
        _causal("mask = q >= k"),
    ),
    "E003": Entry(
        "brackets do not match",
        "Every `(` and `[` is closed by its own kind. The one exception is the half-open range of a "
        "promise, `in [low, high)`.",
        _causal("mask = (q >= k"),
        _causal("mask = (q >= k)"),
    ),
    "E004": Entry(
        "an operator of another language",
        "Conditions are joined by `and`, `or`, `not`, as in Python; there are no bit operations and no shifts.",
        _causal("mask = (q >= k) & (q - k < 128)"),
        _causal("mask = q >= k and q - k < 128"),
    ),
    "E005": Entry(
        "a malformed number",
        "Integers are decimal, with `_` between digits if you like; floats have a point or an exponent. A "
        "product needs its `*`.",
        _causal("mask = q - k < 2k"),
        _causal("mask = q - k < 2_000"),
    ),
    "E006": Entry(
        "the header is missing or misplaced",
        "A file is one variant. Its first statement is `attention name`, with the parameters in parentheses "
        "if there are any.",
        "mask = q >= k",
        _causal("mask = q >= k"),
    ),
    "E007": Entry(
        "no such statement",
        "Statements begin with `attention`, `import`, `tensor`, `let` or `def`, or set `score`, `mask` or "
        "`sink`. There is no assignment: nothing ever changes, `let` gives a name to an expression.",
        _causal("distance = q - k", "mask = distance < 128"),
        _causal("let distance = q - k", "mask = distance < 128"),
    ),
    "E008": Entry(
        "a reserved word as a name",
        "The words of the grammar, the indices `b h hk q k`, the sizes `B H HK Q KV D`, `score mask sink` "
        "and the names of functions keep their meaning everywhere.",
        _causal("let k = 3"),
        _causal("let width = 3"),
    ),
    # Names
    "E010": Entry(
        "an unknown name",
        "A name is an index (`b h hk q k`), a size (`B H HK Q KV D`), `score`, or declared above: a "
        "parameter, a `let`, a tensor, an import, or a size that stands alone in the extents of a tensor.",
        "attention example(window: int = 128)\nmask = q - k < windw",
        "attention example(window: int = 128)\nmask = q - k < window",
    ),
    "E011": Entry(
        "a name is defined twice",
        "One name means one thing in the whole file: nothing is redefined and nothing is shadowed, not by "
        "the parameters of a `def` nor by the variable of a reduction. `score`, `mask` and `sink` are set "
        "once.",
        _causal("let near = q - k < 8", "let near = q - k < 16", "mask = near"),
        _causal("let near = q - k < 8", "let nearer = q - k < 4", "mask = near and not nearer"),
    ),
    "E012": Entry(
        "a tensor is indexed with the wrong number of indices",
        "Every axis needs its index; there are no slices and no broadcasting. The label shows what was "
        "probably meant: the axes `B H HK Q KV` are usually indexed with `b h hk q k`.",
        _causal("tensor doc: int32[B, KV]", "mask = doc[q] == doc[b, k]"),
        _causal("tensor doc: int32[B, KV]", "mask = doc[b, q] == doc[b, k]"),
    ),
    "E013": Entry(
        "a name is used as what it is not",
        "A tensor is indexed, `t[b, q]`; a function is called, `f(x)`; an import has parts, "
        "`causal.mask()`; everything else is a value.",
        _causal("tensor length: int32[B]", "mask = k < length"),
        _causal("tensor length: int32[B]", "mask = k < length[b]"),
    ),
    "E014": Entry(
        "the arguments of a call do not fit",
        "Built-in functions take their arguments by position. A `def` and the parts of an import take them "
        "by position or by name; parameters of an import that have a default may be left out. `score` is "
        "given by name, to `a.score(score=x)`.",
        _causal("let near = clamp(q - k, 8)", "mask = near > 0"),
        _causal("let near = clamp(q - k, 0, 8)", "mask = near > 0"),
    ),
    "E015": Entry(
        "an unknown function",
        "The functions are abs min max clamp floor ceil sign sqrt rsqrt exp exp2 log log2 log1p pow tanh "
        "sigmoid silu relu gelu erf sin cos tan, float and int, and the reductions sum min max any all. "
        "They stand bare: there are no modules.",
        _causal("score = torch.where(q >= k, score, 0.0)"),
        _causal("score = score if q >= k else 0.0"),
    ),
    "E016": Entry(
        "a name is used before its definition",
        "A file is read from top to bottom, and a `def` cannot call itself: calls are inlined.",
        _causal("mask = near", "let near = q - k < 8"),
        _causal("let near = q - k < 8", "mask = near"),
    ),
    # Types
    "E020": Entry(
        "a bool where a number belongs, or a number where a bool belongs",
        "A bool is not a number, and a number is not a condition. `and or not`, conditions and `mask` take "
        "bools; arithmetic, comparisons by order, `score` and `sink` take numbers.",
        _causal("mask = q - k"),
        _causal("mask = q - k != 0"),
    ),
    "E021": Entry(
        "a float where an int belongs",
        "An int becomes a float by itself, a float never becomes an int: write `floor(x)` or `ceil(x)`. "
        "Indices, extents and the bounds of reductions are ints. `/` always gives a float; `//` of ints is "
        "an int.",
        _causal("tensor table: float32[KV]", "score = score + table[k / 2]"),
        _causal("tensor table: float32[KV]", "score = score + table[k // 2]"),
    ),
    "E022": Entry(
        "a divisor that is not positive",
        "The divisors of `//` and `%` must be positive, which proofs rely on. A constant is checked here, a "
        "parameter or a size at the call.",
        _causal("mask = k % 0 == 0"),
        _causal("mask = k % 4 == 0"),
    ),
    "E023": Entry(
        "the exponent of an int power",
        "An int to the power of a constant that is not negative is an int. For any other power make the base a float.",
        _causal("score = score + 2 ** -q"),
        _causal("score = score + 2.0 ** -q"),
    ),
    "E025": Entry(
        "an index that is always out of range",
        "Indices count from 0 to the extent of the axis; a negative index does not count from the end.",
        _causal("tensor pair: float32[2]", "score = score + pair[2]"),
        _causal("tensor pair: float32[2]", "score = score + pair[1]"),
    ),
    # Declarations
    "E030": Entry(
        "an unknown type",
        "Parameters are `int`, `float` or `bool`. Tensors have a dtype: bool, uint8, int8, int16, int32, "
        "int64, float16, bfloat16, float32, float64.",
        "attention example(window: int32 = 128)\nmask = q - k < window",
        "attention example(window: int = 128)\nmask = q - k < window",
    ),
    "E031": Entry(
        "an extent that is not known before the call runs",
        "Extents, and the bounds of `in [low, high)`, are positive expressions of sizes and parameters. "
        "They never depend on a position.",
        _causal("tensor doc: int32[b, KV]", "mask = doc[b, k] == 0"),
        _causal("tensor doc: int32[B, KV]", "mask = doc[b, k] == 0"),
    ),
    "E032": Entry(
        "a promise that cannot be kept",
        "`nondecreasing over AXIS` names an axis by its extent or by its number; `in [low, high)` is about "
        "a tensor of integers and contains low but not high.",
        _causal("tensor doc: int32[B, KV] nondecreasing over Q", "mask = doc[b, k] == 0"),
        _causal("tensor doc: int32[B, KV] nondecreasing over KV", "mask = doc[b, k] == 0"),
    ),
    "E033": Entry(
        "a default that does not fit",
        "The default of a parameter is a constant of its type; an int fits a float parameter.",
        "attention example(window: int = 1.5)\nmask = q - k < window",
        "attention example(window: int = 2 * 64)\nmask = q - k < window",
    ),
    "E034": Entry(
        "the range of a reduction",
        "The bounds of a reduction are known when compiling: literals and `const` parameters. A range is "
        "half open; `min` and `max` need at least one term.",
        "attention example(n: int)\nscore = score * sum(d in 0..n: d)",
        "attention example(const n: int)\nscore = score * sum(d in 0..n: d)",
    ),
    # What a result may depend on
    "E040": Entry(
        "the mask depends on the score",
        "What is dropped is decided by positions, parameters and tensors alone, so that whole blocks can be "
        "skipped before any product is computed.",
        _causal("mask = score > 0"),
        _causal("score = max(score, 0.0)"),
    ),
    "E041": Entry(
        "the sink depends on a position",
        "A sink is one more logit in the denominator of the softmax. It may depend on `b`, `h` and `hk`, "
        "but neither on positions nor on the score.",
        _causal("tensor sinks: float32[H, KV]", "sink = sinks[h, k]"),
        _causal("tensor sinks: float32[H]", "sink = sinks[h]"),
    ),
    # Imports
    "E050": Entry(
        "an import is not found",
        "An import names a file beside the importing one, or a shipped variant. It is a bare name, never a "
        "path, and a symbolic link does not lead out of the directory.",
        _causal("import causl", "mask = causl.mask()"),
        _causal("import causal", "mask = causal.mask()"),
    ),
    "E051": Entry(
        "imports in a circle",
        "The help shows the chain. Move what both need into a third file.",
        _causal("import first", "mask = first.mask()"),
        _causal("import causal", "mask = causal.mask()"),
        beside=_CYCLE,
    ),
    "E052": Entry(
        "an imported tensor clashes",
        "The tensors of an imported variant become tensors of the importing one under the same name, since "
        "they are given by name at the call. A tensor of the same name must therefore be declared alike, "
        "and no parameter may have it.",
        _causal("import gpt_oss", "tensor sinks: int32[B]", "mask = k >= sinks[b]", "sink = gpt_oss.sink()"),
        _causal("import gpt_oss", "tensor first: int32[B]", "mask = k >= first[b]", "sink = gpt_oss.sink()"),
    ),
    "E053": Entry(
        "no such part",
        "An imported variant has the parts `score()`, `mask()` and, if it declares one, `sink()`. Other "
        "values have no parts and no methods.",
        _causal("import causal", "mask = causal.mask"),
        _causal("import causal", "mask = causal.mask()"),
    ),
    # Limits
    "E060": Entry(
        "too long",
        "A file has at most 64 KiB and a name at most 64 characters.",
        _causal(f"let {'very_' * 14}long = 1"),
        _causal("let long = 1"),
    ),
    "E061": Entry(
        "nested too deeply",
        "At most 64 brackets are open at any place, and expressions, with the functions that they call, are "
        "at most 100 deep.",
        _causal(f"let deep = {'(' * 65}q{')' * 65}"),
        _causal("let deep = ((q))"),
    ),
    "E062": Entry(
        "too many operations",
        "Names and calls are inlined, so a short text can describe an enormous expression. The limits are "
        "10,000 distinct operations, 200 on one path, and a million if nothing were shared.",
        _causal("def f(x) = x * x * x * x * x * x * x * x * x * x", "let big = f(f(f(f(f(f(q + 0.5))))))"),
        _causal("def f(x) = x ** 10", "let big = f(f(q + 0.5))"),
    ),
    "E063": Entry(
        "a constant is too large",
        "Constant integers fit 64 bits, the exponent of an int power is at most 63, and floats are finite.",
        _causal("let big = 2 ** 64"),
        _causal("let big = 2 ** 31"),
    ),
    "E064": Entry(
        "a reduction is too long",
        "A reduction, with those around it, has at most 1024 terms.",
        _causal("score = score + sum(d in 0..2000: d)"),
        _causal("score = score + sum(d in 0..100: d)"),
    ),
    "E065": Entry(
        "too many imports",
        "A chain of imports is at most 16 long, and a variant imports at most 64 files in all.",
        _causal("import step1", "mask = step1.mask()"),
        _causal("import causal", "mask = causal.mask()"),
        beside=_CHAIN,
    ),
    "E066": Entry(
        "too many declarations",
        "A variant has at most 32 parameters and 32 tensors; a tensor has at most 8 axes.",
        _causal("tensor t: float32[1, 1, 1, 1, 1, 1, 1, 1, B]"),
        _causal("tensor t: float32[B]"),
    ),
    "E067": Entry(
        "too many errors",
        "Only the first 100 errors of a text are shown.",
        _causal("mask = q" + " & q" * 120),
        _causal("mask = q >= k"),
    ),
}
