"""What stands between "# === shared: NAME ===" and "# === end shared ===" is equal in all scripts.

    python tests/test_shared_blocks.py a2c_proper.py    copies that script's blocks into the others
"""
import ast
import collections
import difflib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINES = {"a2c_naive.py": 380, "a2c_proper.py": 380, "pgql_equiv.py": 480, "soft_dqn.py": 540,
         "natural_pg_damped.py": 600}  # the most a script may have
SHARED_LINES = 230  # of which in fences, network, optimizer and run flags included
PATHS = [ROOT / name for name in LINES]
BLOCK = re.compile(r"^ *# === shared: (.+?) ===\n(.*?)^ *# === end shared ===\n", re.M | re.S)
HEADER = re.compile(r"^ *# === (.+) ===$")
OWN = "the paper", "flags", "algorithm"  # these sections are the script's own and never shared
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

def blocks(path):
    return dict(BLOCK.findall(path.read_text()))

def sections(path):
    """The headers of a script in their order, and for each of its lines the header above it."""
    headers, above, header = [], [""], ""
    for line in path.read_text().splitlines():
        if found := HEADER.match(line):
            header = found[1]
            headers.append(header)
        above.append(header)
    return headers, above  # above[0] belongs to no line: lines count from 1

def test_shared_blocks_are_identical():
    first = {}
    for path in PATHS:
        for name, text in blocks(path).items():
            other, expected = first.setdefault(name, (path.name, text))
            diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), other, path.name,
                                        lineterm="")
            hint = f"repair: python tests/test_shared_blocks.py {other}"
            assert text == expected, "\n".join([f"shared block {name!r}:", *diff, hint])

def test_every_block_is_in_two_scripts_or_more_and_those_of_the_run_in_all():
    count = collections.Counter(name for path in PATHS for name in blocks(path))
    assert {name for name, n in count.items() if n == 1} == set()
    assert count["run flags"] == count["environment and run"] == len(PATHS)

@each_path
def test_fences_are_paired_and_the_sections_of_the_algorithm_outside(path):
    headers, _ = sections(path)
    assert headers[:5] == ["the paper", "flags", "shared: run flags", "end shared", "algorithm"]
    fences = [header.split(":")[0] for header in headers if "shared" in header]
    assert fences == ["shared", "end shared"] * (len(fences) // 2)

def definitions(path):
    """Yields (name, text, section) of what a script defines outside its own sections."""
    source, (_, above) = path.read_text(), sections(path)
    for node in ast.parse(source).body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else [
            ast.unparse(target) for target in getattr(node, "targets", ())]
        for name in names:
            if above[node.lineno] not in OWN:
                yield name, ast.get_source_segment(source, node), above[node.lineno]

def test_what_two_scripts_both_define_is_in_a_fence():
    found = collections.defaultdict(list)
    for path in PATHS:
        for name, text, section in definitions(path):
            found[name, text].append((path.name, section))
    assert len(found) > 8
    for (name, _), places in found.items():
        fenced = all(section.startswith("shared: ") for _, section in places)
        assert len(places) == 1 or fenced, f"{name} is shared and not in a fence: {places}"

@each_path
def test_a_script_is_short(path):
    """The point of this repository: a reader opens one file beside the paper."""
    lines = path.read_text().count("\n")
    shared = sum(match[0].count("\n") for match in BLOCK.finditer(path.read_text()))
    assert lines <= LINES[path.name] and shared <= SHARED_LINES, (lines, shared)

def test_a_changed_block_is_found_and_repaired(tmp_path):
    good, bad = tmp_path / "a.py", tmp_path / "b.py"
    good.write_text((ROOT / "a2c_proper.py").read_text())
    bad.write_text((ROOT / "a2c_naive.py").read_text().replace("[-100:]", "[-101:]"))
    own = bad.read_text().split("# === shared")[0]
    assert blocks(good) != blocks(bad)
    repair(good, [good, bad])
    assert blocks(good) == blocks(bad) and bad.read_text().split("# === shared")[0] == own

def stripped(path):
    """The script's code as lines, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            node.body[0].value.value = ""
    return ast.unparse(tree).splitlines()

def test_naive_and_proper_differ_in_one_line_of_code():
    naive, proper = (stripped(ROOT / f"a2c_{kind}.py") for kind in ("naive", "proper"))
    diff = [line for line in difflib.ndiff(naive, proper) if line[0] in "+-"]
    assert diff == ["+         r = r - tau * KL"]

def test_the_readme_shows_that_diff():
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"```diff\n(.*?)```", text, re.S)[1].splitlines()
    naive, proper = ((ROOT / f"a2c_{kind}.py").read_text() for kind in ("naive", "proper"))
    for line in shown:
        code = line[1:].strip()
        assert code in proper, line
        assert (code in naive) == (not line.startswith("+")), line

def repair(source, paths):
    for path in paths:
        for name, text in blocks(source).items():
            path.write_text(BLOCK.sub(
                lambda m, name=name, text=text: m[0].replace(m[2], text) if m[1] == name else m[0],
                path.read_text()))

if __name__ == "__main__":
    repair(ROOT / sys.argv[1], PATHS)
