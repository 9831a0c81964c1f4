"""Every numbered equation of the paper, in float64, by the scripts' own functions where one has it.

EQUATIONS.md is held to what is checked here and to the sources.

    python tests/test_equations.py      runs the checks and renews the last columns of EQUATIONS.md
"""
import importlib
import inspect
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

import mutants
from equations import base

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
from citations import citations

SECTIONS = "bandit", "mdp", "gradients", "natural", "related"
for section in SECTIONS:
    importlib.import_module(f"equations.{section}")
pytestmark = pytest.mark.usefixtures("double")
SCRIPTS = "a2c_naive", "a2c_proper", "soft_dqn", "pgql_equiv", "natural_pg_damped"

def residuals(number):
    """(largest of the equation, least of the printed form or None) over the seeds."""
    check, found, printed = base.CHECKS[number], [], []
    for seed in base.SEEDS:
        result = check.function(seed)
        if check.margin is not None:
            result, as_printed = result
            printed.append(base.size(as_printed))
        found.append(base.size(result))
    return max(found), min(printed) if printed else None

def test_all_ninety_have_a_check():
    assert sorted(base.CHECKS) == list(range(1, 91))

@pytest.mark.parametrize("number", range(1, 91))
def test_equation(number, monkeypatch):
    """The equation holds, the printed form of a misprint does not, and the scripts computed it."""
    check, called = base.CHECKS[number], set()
    for name in check.computed_by:
        script, function = name.split(".")
        module = importlib.import_module(script)
        original = getattr(module, function)

        def watched(*args, name=name, original=original, **kwargs):
            called.add(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, watched)
    residual, printed = residuals(number)
    assert residual < check.bound
    assert check.margin is None or printed > check.margin, "as printed it must fail"
    assert called == set(check.computed_by)

# EQUATIONS.md

def rows():
    """The cells of each equation's row: number, equation, status, note, code, check, residual."""
    for line in (ROOT / "EQUATIONS.md").read_text().splitlines():
        if re.match(r"\| \d+ \| ", line):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]

def link(path, name):
    """A function by its name and a link to its file; None if it is not defined there."""
    if f"\ndef {name}(" in (ROOT / path).read_text():
        return f"[`{name}`]({path})"

def code_of(check):
    """The functions of scripts that a check goes through, as links."""
    names = [name.split(".") for name in check.computed_by]
    return ", ".join(f"`{s}` " + str(link(f"{s}.py", name)) for s, name in names) or "-"

def check_of(check):
    path = Path(inspect.getsourcefile(check.function)).relative_to(ROOT)
    return str(link(str(path), check.function.__name__))

def residual_of(check, measured):
    """What the residual column says: bound and measured residual, then those of the misprint."""
    (residual, printed), tens = measured, "{:.0e}".format
    text = f"< {tens(check.bound)} ({tens(residual)})"
    return text + (f"; printed > {check.margin:g} ({printed:.2g})" if printed else "")

def test_the_document_has_a_row_for_every_equation():
    assert [int(row[0]) for row in rows()] == list(range(1, 91))
    assert {int(row[0]) for row in rows() if "misprint" in row[2]} == base.MISPRINTED
    for row in rows():
        assert len(row) == 7 and row[1].startswith("$`"), row[0]
        assert row[2] in ("ok", "**misprint**") and (row[3] or row[2] == "ok"), row[0]

def test_the_document_links_to_functions_and_checks_that_exist():
    """If one was renamed: python tests/test_equations.py"""
    for row in rows():
        check = base.CHECKS[int(row[0])]
        assert row[4] == code_of(check) and "None" not in row[4], row[0]
        assert row[5] == check_of(check) and "None" not in row[5], row[0]

def test_the_document_states_bounds_and_residuals_that_keep_them():
    for row in rows():
        check = base.CHECKS[int(row[0])]
        found = re.fullmatch(r"< (\S+) \((\S+)\)(?:; printed > (\S+) \((\S+)\))?", row[6])
        bound, residual, margin, printed = (x and float(x) for x in found.groups())
        assert bound == check.bound > residual and margin == check.margin, row[0]
        assert margin is None or printed > margin

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_a_script_names_has_a_row(script):
    found = citations((ROOT / f"{script}.py").read_text())
    numbers = {number for citation in found for number in citation.numbers}
    assert len(numbers) >= 6 and numbers <= {int(row[0]) for row in rows()}

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_on_a_line_of_code_is_checked_through_a_script(script):
    """What a comment behind a statement names is computed there, or in its twin."""
    text = (ROOT / f"{script}.py").read_text()
    paper = text[text.index("# === the paper ==="):text.index("# === flags ===")]
    for numbers in re.findall(r"\S +# Eq. ([\d, ]+)", paper):
        for number in map(int, re.findall(r"\d+", numbers)):
            assert base.CHECKS[number].computed_by, (script, number)

@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_the_mutation_run_knows_every_mutant(script):
    """Only counted here: python tests/mutants.py takes minutes."""
    found = len(list(mutants.mutants((ROOT / f"{script}.py").read_text())))
    row = re.search(rf"\| \[`{script}.py`\].*? \| (\d+) \| (\d+) \| (.*)\|\n",
                    (ROOT / "EQUATIONS.md").read_text())
    assert int(row[1]) == found and found - int(row[2]) == (1 if row[3].strip() else 0)

def test_the_errata_of_the_document_are_the_misprints():
    text = (ROOT / "EQUATIONS.md").read_text()
    listed = re.findall(r"^\d+\. \*\*Eq\. ([\d, and]+)\*\*", text, re.M)
    assert {int(x) for line in listed for x in re.findall(r"\d+", line)} == base.MISPRINTED

def renew():
    """Writes code, check and residual of each row anew."""
    torch.set_default_dtype(torch.float64)
    path = ROOT / "EQUATIONS.md"
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if re.match(r"\| \d+ \| ", line):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")][:4]
            number = int(cells[0])
            check = base.CHECKS[number]
            cells += [code_of(check), check_of(check), residual_of(check, residuals(number))]
            lines[i] = "| " + " | ".join(cells) + " |"
    path.write_text("\n".join(lines) + "\n")

if __name__ == "__main__":
    renew()
