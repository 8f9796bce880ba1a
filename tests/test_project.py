"""The shape of the project: sizes, folders and what an import brings along."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import train_cq

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    *("cqsnn.py", "train_cq.py", "tests", "data", "benchmarks", ".ci"),
    *("README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore"),
}
MODULES = {"cqsnn.py": 3143, "train_cq.py": 1067}


@pytest.mark.parametrize("name, most", MODULES.items(), ids=MODULES)
def test_module_has_at_most_its_lines(name, most):
    assert len((ROOT / name).read_text().splitlines()) <= most


@pytest.mark.parametrize("name", MODULES)
def test_lines_have_at_most_100_columns(name):
    lines = (ROOT / name).read_text().splitlines()
    assert [n for n, line in enumerate(lines, 1) if len(line) > 100] == []


def body_lines(function):
    """Lines from the first statement after the docstring to the end."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", MODULES)
def test_function_bodies_have_at_most_40_lines(name):
    tree = ast.parse((ROOT / name).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert functions
    assert {f.name: body_lines(f) for f in functions if body_lines(f) > 40} == {}


def test_backward_stands_right_under_its_forward():
    tree = ast.parse((ROOT / "cqsnn.py").read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    layers = [name for name in names if f"{name}_backward" in names and name != "forward"]
    assert {"conv", "depthwise", "sum_pool", "dense", "batch_norm", "activate"} <= set(layers)
    for name in layers:
        assert names[names.index(name) + 1] in (f"{name}_backward", *names_between(names, name))


def names_between(names, name):
    """A forward's own parts may stand between it and its backward, nothing else."""
    between = names[names.index(name) + 1 : names.index(f"{name}_backward")]
    return between if all(part.startswith("_") for part in between) else []


def test_top_level_holds_only_what_is_listed():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    try:
        git = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]
        tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert {path.split("/")[0] for path in tracked.splitlines()} - TOP_LEVEL == set()


def test_every_mutation_has_one_place_in_the_module():
    """tests/audit/mutations.py is too long to run each time; that it can be run is seen here."""
    mutations = runpy.run_path(str(ROOT / "tests" / "audit" / "mutations.py"))["MUTATIONS"]
    source = (ROOT / "cqsnn.py").read_text()
    assert {name: source.count(old) for name, (old, _, _) in mutations.items()} == dict.fromkeys(
        mutations, 1
    )


def test_every_command_of_the_results_is_one():
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    commands = re.findall(r"`python train_cq\.py ([^`]+)`", page)
    assert len(commands) > 50
    for command in commands:
        train_cq.parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("module", ["cqsnn", "train_cq"])
def test_import_brings_no_gpu_and_no_pictures(module):
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(found.stdout.split())
    assert module in loaded
    assert not loaded & {"cupy", "matplotlib", "scipy", "torch"}
