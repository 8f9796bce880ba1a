"""Every name that cqsnn takes from its array module exists in CuPy, with the keywords used.

    python tests/audit/cupy_names.py        # with CuPy installed; a GPU or driver is not needed

Walks the syntax tree of cqsnn.py for xp.NAME, self.xp.NAME and array_module(x).NAME, for names of
the modules in MODULES, and for the methods called on a random Generator, and looks each up in CuPy:
what is missing there, or does not take a keyword or so many positional arguments, is printed, with
exit status 1. cuBLAS's are looked up where it is installed (package nvidia-cublas-cu12, 0.6 GB).
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import cupy

NVIDIA = importlib.util.find_spec("nvidia")  # a name within a package that is missing raises
CUBLAS = NVIDIA and any(importlib.util.find_spec(f"nvidia.{n}") for n in ("cublas", "cu13"))
SOURCE = Path(__file__).resolve().parents[2] / "cqsnn.py"
# of a ufunc's call, which has no signature to inspect; CuPy's documentation lists them
UFUNC_KEYWORDS = {"out", "where", "axes", "axis", "keepdims", "casting", "dtype", "order"}
MODULES = {"cupy": (), "xp": (), "cuda": ("cuda",), "cupy_products": ("_core", "_routines_linalg")}
GENERATORS = {"device_rng"}  # names that hold a Generator of the array module


def module_path(node):
    """Return ("linalg", "norm") for xp.linalg.norm, self.xp.linalg.norm or
    array_module(x).linalg.norm, ("cuda", "runtime") for cuda.runtime, else None."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    names, root = names[::-1], getattr(node, "id", "")
    if root == "self" and names[:1] == ["xp"]:
        root, names = "xp", names[1:]
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "array_module":
        root = "xp"
    return (*MODULES[root], *names) if names and root in MODULES else None


def look_up(path):
    """Return what CuPy has under a path of names, or None."""
    found = importlib.import_module(".".join(("cupy", *path[:2]))) if path[0] == "_core" else cupy
    for name in path[2:] if path[0] == "_core" else path:
        found = getattr(found, name, None)
    return found


def refused(function, call):
    """Return why CuPy's function does not take a call's arguments, or None."""
    keywords = {k.arg for k in call.keywords if k.arg}
    if isinstance(function, cupy.ufunc):
        wrong = keywords - UFUNC_KEYWORDS
        return f"ufunc without {', '.join(wrong)}" if wrong else None
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled, without a signature
        missing = [k for k in keywords if k not in (function.__doc__ or "")]
        return f"no {', '.join(missing)} in its documentation" if missing else None
    starred = any(isinstance(a, ast.Starred) for a in call.args)
    try:
        signature.bind(*([None] * (0 if starred else len(call.args))), **dict.fromkeys(keywords))
    except TypeError as error:
        return None if starred and "missing" in str(error) else str(error)
    return None


def problems(tree):
    """Yield (line, name, what is wrong) of a module's syntax tree."""
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        path = module_path(node) if isinstance(node, ast.Attribute) else None
        if path and (path[:2] != ("cuda", "cublas") or CUBLAS):
            found = look_up(path)
            if found is None:
                yield node.lineno, ".".join(path), "is not in CuPy"
            elif id(node) in calls:
                reason = refused(found, calls[id(node)])
                if reason:
                    yield node.lineno, ".".join(path), reason
        elif isinstance(node, ast.Attribute) and id(node) in calls:
            owner = node.value
            if getattr(owner, "id", "") in GENERATORS or is_generator(owner):
                method = getattr(cupy.random.Generator, node.attr, None)
                reason = refused(method, calls[id(node)]) if method else "is not in CuPy"
                if reason and "self" not in reason:
                    yield node.lineno, f"Generator.{node.attr}", reason


def is_generator(node):
    """Whether an expression is xp.random.default_rng(...)."""
    path = module_path(node.func) if isinstance(node, ast.Call) else None
    return path == ("random", "default_rng")


def main():
    """Print what is wrong, or how many names were found right."""
    tree = ast.parse(SOURCE.read_text())
    paths = {module_path(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)} - {None}
    wrong = sorted(set(problems(tree)))
    for line, name, reason in wrong:
        print(f"cqsnn.py:{line}: {name}: {reason}")
    print(f"CuPy {cupy.__version__}: {len(paths)} names of cqsnn.py looked up, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
