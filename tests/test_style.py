"""What holds for every file of the package."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support import PACKAGE

MOST_PARAMETERS = 8
# Functions that users do not call and that take more: file, function and why.
MORE_PARAMETERS = {
    ("pass_kernels.py", "memory_pass"): "a Triton kernel is launched with pointers and sizes one by one",
    ("pass_kernels.py", "combine_pass"): "as above",
    ("evaluate.py", "evaluate"): "a command: its parameters are its flags",
    ("search.py", "search"): "as above",
}


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below a node, with the class or function that it stands in."""
    for child in ast.iter_child_nodes(node):
        name = owner
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{owner}.{child.name}".lstrip(".")
            if not isinstance(child, ast.ClassDef):
                yield name, child
        yield from functions(child, name)


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def exported() -> set[str]:
    """The names in some `__all__`: what users call, with the signatures that they know."""
    return {
        name
        for tree in trees().values()
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets)
        for name in ast.literal_eval(node.value)
    }


def test_more_than_eight_arguments_travel_as_a_struct():
    public, found = exported(), set()
    for path, tree in trees().items():
        for name, function in functions(tree):
            given = function.args
            names = [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            count = sum(x not in ("self", "cls") for x in names)
            if count > MOST_PARAMETERS and name.removesuffix(".__init__") not in public:
                found.add((path.name, name))
    assert found == set(MORE_PARAMETERS)


def test_the_trainer_stays_a_loop_around_its_parts():
    """What it does at each step belongs into its parts, each a file of its own."""
    tree = trees()[PACKAGE / "training/trainer.py"]
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    assert trainer.end_lineno - trainer.lineno + 1 <= 250
