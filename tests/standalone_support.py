"""Run files that `attn-dsl emit --standalone` writes in a process that cannot import attn_dsl."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from portable_support import Problem, Result

from attn_dsl.backend.portable.standalone import standalone

DRIVER = """
import importlib.abc, runpy, sys, torch

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "attn_dsl":
            raise ImportError("attn_dsl is not to be had here")

sys.meta_path.insert(0, Refuse())
import importlib.util

def module(path):
    spec = importlib.util.spec_from_file_location("alone", path)
    found = importlib.util.module_from_spec(spec)
    sys.modules["alone"] = found
    spec.loader.exec_module(found)
    return found

for path in sys.argv[1:]:
    attention = module(path).attention
    given = torch.load(path + ".in")
    differentiable = given["upstream"] is not None
    inputs = [x.requires_grad_(differentiable and x.is_floating_point()) for x in given["inputs"]]
    outputs = attention(*inputs, **given["parameters"])
    grads = ()
    if differentiable:
        leaves = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g, x in zip(given["upstream"], outputs)])
    torch.save([*(x.detach() for x in outputs), *grads], path + ".out")
assert "attn_dsl" not in sys.modules
"""


def run_alone(problems: Mapping[str, Problem], which: str, folder: Path, interpret: bool) -> dict[str, Result]:
    """What the files of some calls compute, all in one process; `which` as for `standalone`."""
    paths = []
    for name, problem in problems.items():
        variant = problem.program.variant
        path = folder / f"{name}.py"
        path.write_text(standalone(problem.program, which, problem.query.dtype), encoding="utf-8")
        bindings = problem.all_bindings
        inputs = [problem.query, problem.key, problem.value, *(bindings[t.name] for t in variant.tensors)]
        upstream = problem.upstream() if which == "backward" else None
        parameters = {p.name: bindings[p.name] for p in variant.parameters} | {"q_offset": problem.q_offset}
        torch.save({"inputs": inputs, "parameters": parameters, "upstream": upstream}, f"{path}.in")
        paths.append(str(path))
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    answer = subprocess.run(
        [sys.executable, str(driver), *paths], capture_output=True, text=True, env=environment, cwd=folder, timeout=500
    )
    assert answer.returncode == 0, answer.stderr
    return {name: _result(problem, torch.load(folder / f"{name}.py.out")) for name, problem in problems.items()}


def _result(problem: Problem, found: list[torch.Tensor]) -> Result:
    out, lse, *grads = found
    tensors = problem.program.variant.tensors
    bindings = problem.all_bindings
    names = ["query", "key", "value", *(t.name for t in tensors if bindings[t.name].is_floating_point())]
    return Result(out, lse, dict(zip(names, grads, strict=False)))
