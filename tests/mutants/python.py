"""Faults of Python modules, drawn from all that changing one node of the syntax makes."""

from __future__ import annotations

import ast
import copy
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from mutants.trial import passes

ROOT = Path(__file__).resolve().parents[2]
BAD_INPUT = ["tests/test_bad_input_optim.py", "tests/test_faults_numbers.py"]
LOADS = ["tests/test_faults_checkpoints.py", "tests/test_state_dict.py"]
NATIVE = [
    *(f"tests/test_{name}.py" for name in ("stale_plans", "faults_memory", "faults_interrupts")),
    *(f"tests/test_{name}.py" for name in ("absorb", "norm_in_backward", "selection")),
    *("-k", "not eager"),
]
FORMULAS = ["tests/test_battery_numbers.py", "tests/test_numerics.py", "-k", "eager or cpu"]
# Modules where an error matters most, and the tests that are about them.
TARGETS = {
    "pysmooth.optim._validate": BAD_INPUT,
    "pysmooth.optim._clip": [*BAD_INPUT, "tests/test_clip_sgd.py"],
    "pysmooth.optim._loading": LOADS,
    "pysmooth.engine.checks": ["tests/test_bad_input_optim.py", "tests/test_layouts.py"],
    "pysmooth.engine.state": ["tests/test_faults_memory.py", *LOADS],
    "pysmooth.engine.amp": ["tests/test_grad_scaler.py"],
    "pysmooth.engine.native": NATIVE,
    "pysmooth.optim._known": ["tests/test_known_recipes.py"],
    "pysmooth.optim._swap": ["tests/test_swap.py"],
    "pysmooth.distributed.codec": ["tests/test_codec.py", "tests/test_ddp_alone.py"],
    "pysmooth.compressors": ["tests/test_compressors.py", "tests/test_random.py"],
    "pysmooth.reference.clip": [*FORMULAS, "tests/test_norm_edges.py"],
    "pysmooth.reference.adam": FORMULAS,
    "pysmooth.reference.sgd": FORMULAS,
}

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


def changes(node: ast.AST) -> Iterator[Callable[[Any], None]]:
    """Ways to spoil this node in place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield lambda n: n.ops.__setitem__(0, SWAPS[type(n.ops[0])]())
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield lambda n: setattr(n, "op", SWAPS[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        # `not x` and `-x` become x twice negated, and x times one.
        yield lambda n: setattr(n, "operand", ast.UnaryOp(n.op, n.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.If | ast.IfExp):
        yield lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))


def mutants(source: str) -> list[tuple[int, str, ast.Module]]:
    """(line, what it says there now, tree) of every one."""
    tree = ast.parse(source)
    out = []
    for index, node in enumerate(ast.walk(tree)):
        for change in changes(node):
            spoiled = copy.deepcopy(tree)
            here: Any = list(ast.walk(spoiled))[index]
            change(here)
            ast.fix_missing_locations(spoiled)
            said = ast.unparse(here).splitlines()[0]
            out.append((here.lineno, said, spoiled))
    return out


class Instead(MetaPathFinder, Loader):
    """Gives a module another body."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.tree, str(self.path), "exec"), module.__dict__)


def survivors(count: int, names: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Draws so many from each module, or from those named, and runs them."""
    out = []
    for name in names or TARGETS:
        tests = TARGETS[name]
        path = ROOT / f"{name.replace('.', '/')}.py"
        every = mutants(path.read_text())
        drawn = random.Random(seed).sample(every, min(count, len(every)))
        if not passes(lambda: None, tests):
            sys.exit(f"{name}: the tests fail without a mutant")
        for line, said, tree in sorted(drawn, key=lambda m: m[0]):
            finder = Instead(name, path, tree)
            lived = passes(lambda finder=finder: sys.meta_path.insert(0, finder), tests)
            print(f"{'SURVIVED' if lived else 'killed':9} {name}:{line}: {said}", flush=True)
            if lived:
                out.append(f"{name}:{line}: {said}")
        print(f"{name}: {len(drawn)} drawn of {len(every)}", flush=True)
    return out
