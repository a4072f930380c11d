"""Project a clause onto the tile, by Fourier-Motzkin elimination over the integers.

The unknowns of a clause are the positions q, k, quotients `x // W`, and monotone terms of one position. For a tile,
`q0 <= q <= q1` and `k0 <= k <= k1`; eliminating an unknown v combines each lower bound `a*v + x >= 0` with each upper
bound `-b*v + y >= 0` into `b*x + a*y >= 0`. What remains says, in closed form, when a pair of the tile can satisfy the
clause. Two more rules:

    rounding   c*e + d >= 0  gives  e + d // c >= 0        (integers; this is what makes `//` and congruences sharp)
    inverse    max(x, c) >= a  gives  x >= a unless c >= a,  max(x, c) <= a  gives  x <= a and c <= a;  min is dual

Each rule can only weaken, so "no pair satisfies the clause" is always sound. It is exact (`iff`) where every combined
pair has a coefficient 1 for the unknown; `Projection.exact` says so. Every constraint remembers its derivation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from attn_dsl.ir.nodes import (
    Binary,
    BinaryOp,
    Compare,
    CompareOp,
    Const,
    Index,
    Node,
    Select,
    Unary,
    UnaryOp,
    post_order,
)
from attn_dsl.passes.derivation import Combined, Constraint, Derivation, Given, Inverted, Projection, Rounded
from attn_dsl.passes.formula import Atom, Clause, Fact
from attn_dsl.passes.logic import Lowering, is_quotient
from attn_dsl.passes.monotone import CORNERS, K0, K1, POSITIONS, Q0, Q1, interval, varies
from attn_dsl.passes.polynomial import MINUS_ONE, ONE
from attn_dsl.passes.symbolic import Form, Space, constant, unknown

FAR = 1 << 40
"""Beyond every position: stands for "no bound" where an inverse gives one only under a condition."""

MAX_CONSTRAINTS = 24
MIN_DERIVED = 6
"""A clause of many constraints leaves room for fewer derived ones, since pairs grow with the square."""
MAX_GUARDS = 12
"""Where a projection is not exact anyway, this many of its constraints are kept."""


@dataclass
class Projector:
    """Projects clauses; what is given, atoms and corner bounds, is one constraint in all projections that use it."""

    space: Space
    _atoms: dict[Atom, Constraint] = field(default_factory=dict)
    _bounds: dict[Node, tuple[Constraint, Constraint]] = field(default_factory=dict)

    def project(self, clause: Clause, keep: Index | None) -> Projection:
        """Eliminate all unknowns of a clause but `keep` (the position `q` or `k`), or all of them (None).

        Of a long clause not every combination is tried. What its comparisons say one by one still holds, and is asked
        where the whole did not bound the position on some side, or related no row to a key.
        """
        found = _Elimination(self, keep).run(clause)
        if found.exact or found.impossible is not None:
            return found
        if keep is None:
            blank = [] if any(map(self.relates, found.guards)) else [found.guards]
        else:
            blank = [side for side in (found.lower, found.upper) if not side]
        for part in _parts(clause) if blank else ():
            alone = _Elimination(self, keep).run(part)
            for side, said in ((found.guards, alone.guards), (found.lower, alone.lower), (found.upper, alone.upper)):
                if any(side is x for x in blank):
                    side += said
        return found

    def relates(self, guard: Constraint) -> bool:
        """Whether a guard speaks of the positions of both axes: other guards seldom tell one tile from another."""
        factors = {factor for monomial in guard.form.const.terms for factor in self.space.factors(monomial)}
        leaves = set(post_order(*factors))
        return bool(leaves & {Q0, Q1} and leaves & {K0, K1})

    def atom(self, atom: Atom) -> Constraint:
        if atom not in self._atoms:
            rule = "quotient" if atom.definition else "comparison"
            self._atoms[atom] = self.oriented(Constraint(atom.form, Given(atom.origin, rule), not atom.definition))
        return self._atoms[atom]

    def bounds(self, term: Node) -> tuple[Constraint, Constraint]:
        """The corner bounds of a position, or of a monotone term of one position."""
        if term not in self._bounds:
            ends = interval(term)
            assert ends is not None
            low, high = (constant(self.space.poly(end)) for end in ends)
            here = unknown(term)
            self._bounds[term] = (
                self.oriented(Constraint(here - low, Given(term, "corner"), False)),
                self.oriented(Constraint(high - here, Given(term, "corner"), False)),
            )
        return self._bounds[term]

    def oriented(self, constraint: Constraint) -> Constraint:
        """The constraint rounded, and for each unknown from which side it bounds it, where that is known."""
        divisor = self.space.common_factor(constraint.form)
        if divisor != ONE:
            form = self.space.divide(constraint.form, divisor)
            constraint = Constraint(form, Rounded(constraint, divisor), constraint.own)
        for term, coefficient in constraint.form.terms.items():
            rising = self.space.nonnegative(coefficient)
            if rising is None and self.space.nonnegative(-coefficient):
                rising = False
            if rising is not None:
                constraint.rising[term] = rising
        return constraint


@dataclass
class _Elimination:
    projector: Projector
    keep: Index | None
    constraints: list[Constraint] = field(default_factory=list)
    given: int = 0
    eliminated: int = 0
    result: Projection = field(default_factory=Projection)

    @property
    def space(self) -> Space:
        return self.projector.space

    def run(self, clause: Clause) -> Projection:
        self.result.facts = tuple(x for x in clause.literals if isinstance(x, Fact))
        self.result.exact = not clause.relaxed and not clause.unknowns
        for atom in _without_coarse_laws([x for x in clause.literals if isinstance(x, Atom)]):
            self.add(self.projector.atom(atom))
        self.bound_positions()
        self.given = len(self.constraints)
        while (term := self.next_unknown()) is not None:
            if self.is_kept_side(term):
                self.invert(term)
            else:
                self.eliminate(term)
        self.collect()
        return self.result

    # -- constraints --------------------------------------------------------------------------------------------------

    def add(self, constraint: Constraint) -> None:
        """Keep an oriented constraint, unless another one implies it; drop those that it implies."""
        form = constraint.form
        if len(constraint.rising) < len(form.terms):
            self.result.exact = False  # neither a lower nor an upper bound
            return
        if not form.terms:
            verdict = self.space.nonnegative(form.const)
            if verdict is False:
                self.result.impossible = constraint
            if verdict is True or not constraint.own:
                return
        for other in list(self.constraints):
            if other.form.terms == form.terms:
                gap = form.const - other.form.const
                weaker = self.space.nonnegative(gap)
                if weaker:
                    return
                if weaker is False or self.space.nonnegative(-gap):
                    self.constraints.remove(other)
        self.constraints.append(constraint)

    def bound_positions(self) -> None:
        """Corner bounds of every term of an eliminated position: q itself, and monotone terms of q."""
        unknowns = self.unknowns()
        for term in unknowns:
            if term is self.keep or self.is_kept_side(term):
                continue
            if isinstance(term, Index):
                self.add_bounds(term)
            elif not is_quotient(term):
                self.add_bounds(term)
                self.result.exact &= self.is_lone(term, unknowns)
        for position in CORNERS:
            if position is not self.keep and position not in unknowns and self.under_quotient(position, unknowns):
                self.add_bounds(position)

    def under_quotient(self, position: Index, unknowns: Iterable[Node]) -> bool:
        return any(is_quotient(u) and position.name in u.depends for u in unknowns)

    def add_bounds(self, term: Node) -> None:
        for bound in self.projector.bounds(term):
            self.add(bound)

    def is_lone(self, term: Node, unknowns: Iterable[Node]) -> bool:
        """Whether the corner bounds of a monotone term lose nothing: it takes every value between, or is bounded from
        one side only, and nothing else in the clause moves with its position."""
        signs = {c.rising[term] for c in self.constraints if term in c.rising and c.own}
        others = any(u is not term and u.depends & term.depends & POSITIONS for u in unknowns)
        return not others and (len(signs) == 1 or _is_gapless(term))

    def derive(self, form: Form, why: Derivation, *, own: bool) -> None:
        self.add(self.projector.oriented(Constraint(form, why, own)))

    # -- elimination --------------------------------------------------------------------------------------------------

    def next_unknown(self) -> Node | None:
        """The cheapest term to eliminate: exact pairs first, then the fewest; terms of the kept side come last."""
        return min((u for u in self.unknowns() if u is not self.keep), key=self.cost, default=None)

    def unknowns(self) -> dict[Node, None]:
        """The unknowns of the constraints, in the order of their first use: what comes out is the same every time."""
        return dict.fromkeys(u for c in self.constraints for u in c.form.terms)

    def cost(self, term: Node) -> tuple[bool, bool, int]:
        lower, upper = self.sides(term)
        inexact = any(not _is_unit_pair(x, y, term) for x in lower for y in upper if x.own or y.own)
        return self.is_kept_side(term), inexact, len(lower) * len(upper)

    def sides(self, term: Node) -> tuple[list[Constraint], list[Constraint]]:
        """The constraints that bound a term from below, and from above."""
        lower: list[Constraint] = []
        upper: list[Constraint] = []
        for constraint in self.constraints:
            rising = constraint.rising.get(term)
            if rising is not None:
                (lower if rising else upper).append(constraint)
        return lower, upper

    def eliminate(self, term: Node) -> None:
        lower, upper = self.sides(term)
        self.constraints = [c for c in self.constraints if term not in c.form.terms]
        self.eliminated += 1
        for x in lower:
            for y in upper:
                self.combine(x, y, term)
        self.limit()

    def limit(self) -> None:
        """Of very many constraints keep those with the shortest derivations; what is left out is only not used."""
        derived = [c for c in self.constraints if c.form.terms and c.weight > 1]
        room = max(MIN_DERIVED, MAX_CONSTRAINTS - self.given)
        if len(derived) > room:
            dropped = set(sorted(derived, key=lambda c: c.weight)[room:])
            self.constraints = [c for c in self.constraints if c not in dropped]
            self.result.exact = False

    def combine(self, x: Constraint, y: Constraint, term: Node) -> None:
        a, b = x.form.terms[term], -y.form.terms[term]
        if _is_law_of(term, x) and _is_law_of(term, y):
            return  # 0 <= W - 1: the quotient always exists
        self.result.exact &= _is_unit_pair(x, y, term) or not (x.own or y.own)
        # Chernikov: after n eliminations, what rests on more than n + 1 premises is implied by the others.
        if len(x.premises | y.premises) > self.eliminated + 1:
            return
        factor_x, factor_y = (ONE, ONE) if a == b else (b, a)
        form = x.form.times(factor_x) + y.form.times(factor_y)
        self.derive(form, Combined(factor_x, x, factor_y, y), own=x.own or y.own)

    # -- terms of the kept side ---------------------------------------------------------------------------------------

    def is_kept_side(self, term: Node) -> bool:
        """Whether an term is a monotone term (no quotient) of the kept position."""
        return (
            self.keep is not None
            and term is not self.keep
            and term.depends & POSITIONS == self.keep.depends
            and not is_quotient(term)
        )

    def invert(self, term: Node) -> None:
        mine = [c for c in self.constraints if term in c.form.terms]
        self.constraints = [c for c in self.constraints if term not in c.form.terms]
        for constraint in mine:
            unit = constraint.form.terms[term] in (ONE, MINUS_ONE)
            if not unit or len(constraint.form.terms) > 1 or not isinstance(term, Binary):
                self.result.exact = False
                continue
            rising = constraint.rising[term]
            for form in self.inverse(term, constraint.form, rising):
                self.derive(form, Inverted(constraint), own=constraint.own)
                self.add_laws(form)

    def inverse(self, term: Binary, form: Form, rising: bool) -> Iterator[Form]:
        """max(x, c) >= a: x >= a, or nothing where c >= a. max(x, c) <= a: x <= a and c <= a. min(x, c): dually."""
        if varies(term.x) == varies(term.y) or term.op not in (BinaryOp.MIN, BinaryOp.MAX):
            self.result.exact = False
            return
        x, c = (term.x, term.y) if varies(term.x) else (term.y, term.x)
        argument, level = Lowering(self.space).form(x), self.space.poly(c)
        limit = -form.const if rising else form.const
        sign = ONE if rising else MINUS_ONE
        if (term.op is BinaryOp.MAX) == rising:
            settled = level - limit if rising else limit - level
            if self.space.nonnegative(settled):
                return
            if not self.space.nonnegative(-settled - 1):
                c_node, limit_node = self.space.node(level), self.space.node(limit)
                op = CompareOp.GE if rising else CompareOp.LE
                free = Select(Compare(op, c_node, limit_node), Const(-FAR if rising else FAR), limit_node)
                limit = self.space.symbol(free)
        else:
            yield constant(level - limit).times(sign)
        yield (argument - constant(limit)).times(sign)

    def add_laws(self, form: Form) -> None:
        """A quotient that an inverse uncovers comes with its law."""
        for quotient in filter(is_quotient, form.terms):
            for law in Lowering(self.space).laws(quotient, form.terms):
                self.derive(law, Given(quotient, "quotient"), own=False)

    # -- result -------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        for constraint in self.constraints:
            rising = None if self.keep is None else constraint.rising.get(self.keep)
            if rising is None:
                self.result.guards.append(constraint)
            elif constraint.own:
                (self.result.lower if rising else self.result.upper).append(constraint)
        if not self.result.exact:
            self.result.guards = sorted(self.result.guards, key=self.interest)[:MAX_GUARDS]

    def interest(self, guard: Constraint) -> tuple[bool, int]:
        return not self.projector.relates(guard), guard.weight


def _parts(clause: Clause) -> list[Clause]:
    """The comparisons that a clause is made of, each with the laws of its quotients; none where it is one."""
    atoms = [x for x in clause.literals if isinstance(x, Atom)]
    laws: dict[Node, list[Atom]] = {}
    groups: dict[Node, list[Atom]] = {}
    for atom in atoms:
        (laws if atom.definition else groups).setdefault(atom.origin, []).append(atom)
    for group in groups.values():
        seen: set[Node] = set()
        for atom in group:  # grows: a law may speak of other quotients
            for quotient in atom.form.terms:
                if quotient in laws and quotient not in seen:
                    seen.add(quotient)
                    group += laws[quotient]
    return [Clause(tuple(group)) for group in groups.values()] if len(groups) > 1 else []


def _without_coarse_laws(atoms: list[Atom]) -> list[Atom]:
    """Leave out 0 <= k - W*H*z < W*H where 0 <= a - H*z < H and 0 <= k - W*a < W stand, which imply it."""
    chained = {x.origin for x in atoms if x.definition and _is_chained(x)}
    return [x for x in atoms if not (x.definition and x.origin in chained and not _is_chained(x))]


def _is_chained(law: Atom) -> bool:
    """Whether a law of a quotient speaks of another quotient of the same argument."""
    return any(term is not law.origin and is_quotient(term) and term.x is law.origin.x for term in law.form.terms)  # type: ignore[attr-defined]


def _is_law_of(quotient: Node, constraint: Constraint) -> bool:
    return isinstance(constraint.why, Given) and constraint.why.rule == "quotient" and constraint.why.origin is quotient


def _is_unit_pair(x: Constraint, y: Constraint, term: Node) -> bool:
    return x.form.terms[term] == ONE or y.form.terms[term] == MINUS_ONE


def _is_gapless(node: Node) -> bool:
    """Whether a monotone term moves by at most 1 when its position does, so that it takes every value between."""
    match node:
        case Index():
            return True
        case Unary(UnaryOp.NEG, x):
            return _is_gapless(x)
        case Binary(BinaryOp.MIN | BinaryOp.MAX, x, y):
            return all(_is_gapless(side) for side in (x, y) if varies(side))
        case Binary(BinaryOp.ADD | BinaryOp.SUB, x, y):
            return varies(x) != varies(y) and _is_gapless(x if varies(x) else y)
        case Binary(BinaryOp.FLOORDIV, x, _):
            return _is_gapless(x)
        case _:
            return False
