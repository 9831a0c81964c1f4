"""Blocks between "# === shared: NAME ===" and "# === end shared ===" are the same in every script.

    python tests/test_shared_blocks.py a2c_proper.py    copies that script's blocks into the others
"""
import ast
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["a2c_naive.py", "a2c_proper.py", "soft_dqn.py", "pgql_equiv.py", "natural_pg_damped.py"]
BLOCK = re.compile(r"^ *# === shared: (.+?) ===\n(.*?)^ *# === end shared ===\n", re.M | re.S)


def present():
    return [ROOT / name for name in SCRIPTS if (ROOT / name).exists()]


def blocks(path):
    return {name: text for name, text in BLOCK.findall(path.read_text())}


def test_shared_blocks_are_identical():
    assert len(present()) >= 2
    first = {}
    for path in present():
        found = blocks(path)
        assert {"waiting threads", "run flags", "environment", "run"} <= found.keys(), path.name
        for name, text in found.items():
            other, expected = first.setdefault(name, (path.name, text))
            diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), other, path.name,
                                        lineterm="")
            hint = f"repair: python tests/test_shared_blocks.py {other}"
            assert text == expected, "\n".join([f"shared block {name!r}:", *diff, hint])


def test_fences_are_paired():
    for path in present():
        fences = re.findall(r"^ *# === (shared|end shared)", path.read_text(), re.M)
        assert fences == ["shared", "end shared"] * (len(fences) // 2), path.name


def test_a_changed_block_is_found_and_repaired(tmp_path):
    good, bad = tmp_path / "a.py", tmp_path / "b.py"
    good.write_text((ROOT / "a2c_proper.py").read_text())
    bad.write_text((ROOT / "a2c_naive.py").read_text().replace("FRAME_SKIP = 4", "FRAME_SKIP = 5"))
    own = bad.read_text().split("# === shared")[0]
    assert blocks(good) != blocks(bad)
    repair(good, [good, bad])
    assert blocks(good) == blocks(bad) and bad.read_text().split("# === shared")[0] == own


def stripped(path):
    """The script's code as lines, without comments, docstrings and defaults of flags."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            node.body[0].value.value = ""
        if isinstance(node, ast.AnnAssign):
            node.value = None
    return ast.unparse(tree).splitlines()


def test_naive_and_proper_differ_in_one_line_of_code():
    naive, proper = (stripped(ROOT / f"a2c_{kind}.py") for kind in ("naive", "proper"))
    diff = [line for line in difflib.ndiff(naive, proper) if line[0] in "+-"]
    assert diff == ["+     r = r - tau * KL"]


def test_the_readme_shows_that_diff():
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"```diff\n(.*?)```", text, re.S)[1].splitlines()
    naive, proper = ((ROOT / f"a2c_{kind}.py").read_text() for kind in ("naive", "proper"))
    for line in shown:
        code = line[1:]
        assert code.strip() in proper, line
        assert (code.strip() in naive) == (not line.startswith("+")), line


def repair(source, paths):
    for path in paths:
        for name, text in blocks(source).items():
            path.write_text(BLOCK.sub(
                lambda m, name=name, text=text: m[0].replace(m[2], text) if m[1] == name else m[0],
                path.read_text()))


if __name__ == "__main__":
    repair(ROOT / sys.argv[1], present())
