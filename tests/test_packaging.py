"""What people copy and install: one file needs five packages, and every list of them agrees."""
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


def test_inline_metadata_equals_the_projects(script):
    """By the pattern of the packaging standard (PEP 723), so that `uv run FILE` works."""
    pattern = r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$"
    found = list(re.finditer(pattern, (ROOT / f"{script.__name__}.py").read_text()))
    assert [m["type"] for m in found] == ["script"]
    metadata = tomllib.loads("".join(line[2:] + "\n" for line in found[0]["content"].splitlines()))
    assert metadata["requires-python"] == PROJECT["requires-python"]
    assert metadata["dependencies"] == PROJECT["dependencies"]


def test_a_script_imports_five_packages_and_no_file_of_ours(script):
    tree = ast.parse((ROOT / f"{script.__name__}.py").read_text())
    top = {name.split(".")[0] for node in tree.body for name in imported(node)}
    lazy = {name.split(".")[0] for node in ast.walk(tree) for name in imported(node)} - top
    assert top - sys.stdlib_module_names == ALLOWED
    assert lazy <= ALLOWED | sys.stdlib_module_names, "an extra is imported behind its flag"


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def test_the_build_knows_every_script():
    listed = PYPROJECT["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(p.stem for p in ROOT.glob("*.py"))


OURS = [p for of in ("*", "tests/**/*", "benchmarks/*", "paper/*") for p in ROOT.glob(f"{of}.py")]


@pytest.mark.parametrize("path", sorted(OURS), ids=lambda p: p.name)
def test_lines_have_at_most_100_characters(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number}"
