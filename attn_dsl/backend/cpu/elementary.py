"""Elementwise functions of the emitted tile functions, where torch's own are missing or slow.

torch hands float32 `tanh` to a vector library at several times the cost of the matrix products around it. A float32
tile gets multiply-adds instead: the shortest odd polynomial that is right to half a unit in the last place over the
range of the tile (soft caps stay near zero), or the rational function of Eigen (`generic_fast_tanh_float`), within
seven units everywhere.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from attn_dsl.backend.cpu.scratch import scratch

POLYNOMIALS = (
    (0.035, (0.999999975, -0.333170073)),
    (0.15, (0.999999981, -0.333318171, 0.131530657)),
    (0.33, (0.999999978, -0.333326865, 0.133033819, -0.0494818319)),
    (0.52, (0.999999981, -0.333329791, 0.133227071, -0.0528379157, 0.0168103136)),
    (0.75, (0.999999971, -0.333329589, 0.13325406, -0.0533444301, 0.0195829082, -0.00471625726)),
)
"""`(X, c)`: |x (c0 + c1 x^2 + c2 x^4 + ...) / tanh(x) - 1| < 3e-8 for |x| <= X; minimax, by Remez's exchange."""
SATURATION = 7.90531110763549805
"""Beyond it tanh is 1 in float32."""
NUMERATOR = (
    4.89352455891786e-03,
    6.37261928875436e-04,
    1.48572235717979e-05,
    5.12229709037114e-08,
    -8.60467152213735e-11,
    2.00018790482477e-13,
    -2.76076847742355e-16,
)
DENOMINATOR = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
SAMPLE = 512
"""How many elements say which polynomial is likely."""
FEW = 4096
"""Below so many elements the calls cost more than the arithmetic."""


def clip(index: Tensor | int, extent: int) -> Tensor | int:
    """The index moved into `[0, extent)`."""
    if isinstance(index, int):
        return min(max(index, 0), extent - 1)
    return index.clamp(0, extent - 1)


def nonzero(divisor: Tensor) -> Tensor:
    """The divisor with 1 for 0: a division must not fail where its value is never used."""
    return divisor.masked_fill(divisor == 0, 1)


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent, elementwise."""
    return tanh_(x.clone())


def tanh_(x: Tensor) -> Tensor:
    """Hyperbolic tangent in place. nan stays nan."""
    if x.dtype is not torch.float32 or x.numel() < FEW:
        return x.tanh_()
    quotient = _quotient_by_square(x)
    if quotient is not None:
        return x.mul_(quotient)
    square = torch.mul(x, x, out=scratch("tanh.square", x.shape, x.dtype))
    bound = math.sqrt(square.amax().item())
    for reach, coefficients in POLYNOMIALS:
        if bound <= reach:
            return x.mul_(_polynomial(coefficients, square, "tanh.numerator"))
    x.clamp_(-SATURATION, SATURATION)
    torch.mul(x, x, out=square)
    x.mul_(_polynomial(NUMERATOR, square, "tanh.numerator"))
    return x.div_(_polynomial(DENOMINATOR, square, "tanh.denominator"))


def _quotient_by_square(x: Tensor) -> Tensor | None:
    """tanh(x) / x by the second polynomial with its square completed, `d + c2 (x^2 + k)^2`: a pass less than by Horner.

    Tried where a sample of x lies in its range and beyond the first's; None where it does not hold for all of x.
    """
    reach, (c0, c1, c2) = POLYNOMIALS[1]
    if not x.is_contiguous():
        return None
    sampled = x.view(-1)[:: max(x.numel() // SAMPLE, 1)].abs().amax().item()
    if not POLYNOMIALS[0][0] < sampled <= reach:
        return None
    k = c1 / (2 * c2)
    shifted = torch.addcmul(_constant(k), x, x, out=scratch("tanh.numerator", x.shape, x.dtype))
    if not shifted.amax().item() <= k + reach * reach:
        return None
    return torch.addcmul(_constant(c0 - c1 * k / 2), shifted, shifted, value=c2, out=shifted)


def _polynomial(coefficients: tuple[float, ...], x: Tensor, name: str) -> Tensor:
    """`c0 + c1 x + c2 x^2 + ...` by Horner's rule, in a scratch buffer; one pass for each coefficient."""
    *low, last, first = coefficients
    result = torch.add(_constant(last), x, alpha=first, out=scratch(name, x.shape, x.dtype))
    for coefficient in reversed(low):
        torch.addcmul(_constant(coefficient), result, x, out=result)
    return result


@lru_cache(maxsize=64)
def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)
