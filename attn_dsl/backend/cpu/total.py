"""Functions of Python numbers that have an answer for everything, as IEEE 754 says, where Python raises.

The schedule's functions are straight-line code: they compute branches that are not taken, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

EXTREME = 2**31 - 1
"""In place of an infinity, rounded to an integer."""


def _total(function: Callable[[float], float]) -> Callable[[float], float]:
    def answered(x: float) -> float:
        try:
            return function(x)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return answered


def _logarithm(function: Callable[[float], float], pole: float) -> Callable[[float], float]:
    inside = _total(function)
    return lambda x: -math.inf if x == pole else inside(x)


sqrt, exp, sin, cos, tan = map(_total, (math.sqrt, math.exp, math.sin, math.cos, math.tan))
tanh, erf = math.tanh, math.erf
log, log2, log1p = _logarithm(math.log, 0.0), _logarithm(math.log2, 0.0), _logarithm(math.log1p, -1.0)


def pow(x: float, y: float) -> float:
    """x ** y."""
    try:
        return math.pow(x, y)
    except OverflowError:
        return -math.inf if x < 0 and y % 2 == 1 else math.inf
    except ValueError:
        return math.inf if x == 0 else math.nan


def divide(x: float, y: float) -> float:
    """x / y."""
    if y == 0:
        return math.nan if x == 0 or x != x else math.copysign(math.inf, x) * math.copysign(1.0, y)
    return x / y


def divide_down(x: float, y: float) -> float:
    """x // y; by zero it is what x / y is."""
    return x // y if y else divide(x, y)


def remainder(x: float, y: float) -> float:
    """x % y."""
    return x % y if y and math.isfinite(x) else math.nan


def floor(x: float) -> int:
    return math.floor(_bounded(x))


def ceil(x: float) -> int:
    return math.ceil(_bounded(x))


def _bounded(x: float) -> float:
    return min(max(x, -EXTREME), EXTREME) if x == x else 0.0


def element(values: Sequence[Any], *indices: int) -> Any:
    """An element of nested lists, the indices moved into range."""
    for index in indices:
        values = values[min(max(index, 0), len(values) - 1)]
    return values
