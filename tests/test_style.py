"""What holds for every file of the package."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support import PACKAGE, ROOT

MOST_PARAMETERS = 8
# Functions that users do not call and that take more: file, function and why.
MORE_PARAMETERS = {
    ("pass_kernels.py", "memory_pass"): "a Triton kernel is launched with pointers and sizes one by one",
    ("pass_kernels.py", "combine_pass"): "as above",
    ("evaluate.py", "evaluate"): "a command: its parameters are its flags",
    ("search.py", "search"): "as above",
}

# Inner loops of the kernels, which take pointers, strides and lengths one by one; and one that Python calls.
MORE_PARAMETERS_IN_CPP = {
    *(
        ("cpu_loops.h", name)
        for name in ("add_products", "add_products_to_rows", "inner_products", "inner_products_of")
    ),
    *(("scan_cpu_reverse.h", name) for name in ("evaluation_backward", "add_key_backward")),
    ("scan_cpu_backward_isa.cpp", "retrieval_backward"),
    ("head_spatial.h", "column"),
    ("combine_isa.cpp", "combine_columns"),
    ("softmax_cpu_isa.cpp", "differentiate"),
    ("ranking.cpp", "features_ranks"),
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


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Names of the functions that a C++ or CUDA file defines, and how many parameters each has."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    for opening in re.finditer(r"\b(\w+)\s*\(", text):
        depth, angles, count, end = 1, 0, 1, opening.end()
        while depth and end < len(text) and text[end] != ";":
            depth += (text[end] in "([{") - (text[end] in ")]}")
            angles = max(0, angles + (text[end] == "<") - (text[end] == ">"))
            count += text[end] == "," and depth == 1 and not angles
            end += 1
        defined = depth == 0 and re.match(r"\s*(const\s*|noexcept\s*)*\{", text[end:])
        if defined and opening[1] not in ("if", "for", "while", "switch"):
            yield opening[1], count


def test_more_than_eight_arguments_travel_as_a_struct_in_cpp_too():
    assert dict(cpp_functions("int f(A<B, C> a, int b) const { g(1, 2); } // h(int a) {}")) == {"f": 2}
    files = [path for room in ("csrc", "python_bindings") for path in (ROOT / room).rglob("*.[ch]*")]
    found = [(path.name, *each) for path in files for each in cpp_functions(path.read_text())]
    assert len(found) > 500
    assert {(file, name) for file, name, count in found if count > MOST_PARAMETERS} == MORE_PARAMETERS_IN_CPP


def test_the_trainer_stays_a_loop_around_its_parts():
    """What it does at each step belongs into its parts, each a file of its own."""
    tree = trees()[PACKAGE / "training/trainer.py"]
    (trainer,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    assert trainer.end_lineno - trainer.lineno + 1 <= 250
