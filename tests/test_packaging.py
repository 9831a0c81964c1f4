"""What people copy and install: one file needs five packages, and the project lists these."""
import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
ALLOWED = {"torch", "gymnasium", "ale_py", "numpy", "tyro"}

def test_a_script_imports_five_packages_and_no_file_of_ours(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    top = {name.split(".")[0] for node in tree.body for name in imported(node)}
    lazy = {name.split(".")[0] for node in ast.walk(tree) for name in imported(node)} - top
    assert top - sys.stdlib_module_names == ALLOWED
    assert not top & {"fcntl", "resource", "termios", "pwd"}, "not on Windows"
    assert not lazy, "an extra is imported behind its flag, through one of the five"

def test_threads_are_told_to_sleep_before_torch_starts_them(script):
    """On a busy machine those that spin slow everything down: benchmarks/README.md."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    set_at = source.index('os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")')
    assert set_at < min(source.index(f"import {name}") for name in ALLOWED)

def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []

def test_the_project_needs_the_same_five_packages():
    needed = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in PROJECT["dependencies"]}
    assert needed == ALLOWED

def test_the_build_knows_every_script():
    listed = PYPROJECT["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(p.stem for p in ROOT.glob("*.py"))

OURS = [p for of in ("*", "tests/**/*", "benchmarks/*", "paper/*") for p in ROOT.glob(f"{of}.py")]

@pytest.mark.parametrize("path", sorted(OURS), ids=lambda p: p.name)
def test_lines_have_at_most_100_characters(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number}"
