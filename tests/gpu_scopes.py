"""Which tests on a GPU compile the same kernels: one worker runs them, lest several compile one kernel at a time."""

from __future__ import annotations

import re

from xdist.scheduler import LoadScopeScheduling

APART = {"compiled_graph", "hundred", "long_sequences", "built_ahead", "many_threads", "quick"}
"""Of `test_citizen.py`, tests with kernels or processes of their own."""


def scope_of(nodeid: str) -> str:
    """What tests with the same kernels have in common: parameters that kernels do not depend on are left out."""
    path, _, test = nodeid.partition("::")
    name, _, parameters = test.partition("[")
    module = path.rpartition("/")[2].removeprefix("test_").removesuffix(".py")
    parameters = parameters.removesuffix("]")
    if module == "citizen":
        return nodeid if any(word in name for word in APART) else module
    if module in ("hopper_forward", "hopper_backward"):
        if name in ("test_lengths_and_offsets", "test_sums_of_every_kind"):
            parameters = re.sub(r"-?\(.*\)", "", parameters)
        if name.startswith("test_soft_caps"):
            parameters = re.sub(r"-[\d.]+-", "-", parameters)
        if not parameters:
            return module
    return f"{module} {name} {parameters}"


class ByKernels(LoadScopeScheduling):  # type: ignore[misc]
    def _split_scope(self, nodeid: str) -> str:
        return scope_of(nodeid)
