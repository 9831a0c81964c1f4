"""What the pages say can be typed, clicked and found."""
import importlib
import re
import shlex

import pytest
import tyro

from conftest import SCRIPTS
from util import ROOT, trained

PAGES = [*ROOT.glob("*.md"), *(p for of in ("paper", "results", "benchmarks")
                               for p in ROOT.glob(f"{of}/*.md"))]
README = (ROOT / "README.md").read_text()

@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_explains_every_column(name, tmp_path):
    flags = dict(total_timesteps=60, eval_games=1, eval_every=0)
    run = trained(importlib.import_module(name), tmp_path, **flags)
    for log in ("metrics.csv", "eval.csv"):
        for column in (run / log).read_text().splitlines()[0].split(","):
            words = column.removeprefix("score_").removeprefix("length_")
            assert f"`{column}`" in README or words in ("mean", "std", "min", "max"), column

def commands():
    """The commands that pages and docstrings have the reader type, as lists of words."""
    texts = [p.read_text() for p in PAGES]
    texts += [(ROOT / f"{name}.py").read_text().split('"""')[1] for name in SCRIPTS]
    for found in re.findall(r"\bpython ((?:\w+/)*\w+\.py[^`\n]*)", "\n".join(texts)):
        yield shlex.split(found.split("  #")[0].split("&&")[0])

def test_the_commands_of_the_pages_can_be_typed():
    typed = 0
    for path, *flags in commands():
        assert (ROOT / path).exists(), path
        if path[:-3] in SCRIPTS and "<" not in " ".join(flags):
            tyro.cli(importlib.import_module(path[:-3]).Args, args=flags)
            typed += 1
    assert typed > 10

def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}

@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"\$`.*?`\$", "", page.read_text())  # formulas have brackets, too
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            path = page.parent / path if path else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target
