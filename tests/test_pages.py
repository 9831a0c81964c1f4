"""paper/pages.py: every link leads somewhere, every formula is typeset, no line of code is lost."""
import re
import subprocess
import sys
import unicodedata
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
import pages
from citations import citations

SHOWN = [f"{name}.py" for name in pages.SCRIPTS] + [f"tests/equations/{c}.py" for c in pages.CHECKS]
ROWS = re.findall(r"^\| (\d+) \| .* \| (ok|\*\*misprint\*\*) \| .*\[`(\w+)`\]\(\S+\) \| (.*) \|$",
                  (ROOT / "EQUATIONS.md").read_text(), re.M)

class Page(HTMLParser):
    """What a page holds. Cards and lines of code are known by the div and section around them."""
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.tags, self.code, self.math = [], [], [], "", []
        self.cards, self.lines, self.open = [], {}, []
        self.text = path.read_text("utf-8")
        self.feed(self.text)
        assert not self.open, "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        name, kind = attributes.get("id"), attributes.get("class")
        self.tags.append(tag)
        self.ids += [name] if name else []
        self.links += [attributes[a] for a in ("href", "src") if a in attributes]
        around = [next((at for *what, at in self.open[::-1] if wanted in what), None)
                  for wanted in ("cited", "section")]
        if kind == "card":
            self.cards.append((int(name.split("-")[1]), *around))
        if kind == "l":
            self.lines[int(name[1:])] = around
        if tag not in ("meta", "link", "wbr"):
            self.open.append((tag, kind, self.getpos()))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        inside = [tag for tag, *_ in self.open]
        self.code += text if "pre" in inside else ""
        self.math += [(inside[-1], text)] if "math" in inside else []

def run(*arguments, without):
    """paper/pages.py where some packages are missing."""
    program = (f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'paper')!r});"
               f"sys.modules.update(dict.fromkeys({without!r})); sys.argv[0] = 'pages.py';"
               "runpy.run_module('pages', run_name='__main__')")
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)],
                          capture_output=True, text=True)

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages by file name, and what else lies beside them; built without PyTorch."""
    out = tmp_path_factory.mktemp("pages") / "site"
    done = run("--out", out, without=["torch", "numpy"])
    assert not done.returncode, done.stderr
    return {path.name: path.suffix == ".html" and Page(path) for path in out.iterdir()}

@pytest.fixture(params=SHOWN)
def shown(request, site):
    """Each source in turn with its page."""
    return (ROOT / request.param).read_text(), site[Path(request.param).stem + ".html"]

def test_every_link_leads_to_something_in_the_site(site):
    for name, page in site.items():
        for link in page.links if page else ():
            path, _, anchor = link.partition("#")
            assert link == pages.PAPER or (path or name) in site, (name, link)
            assert not anchor or anchor in site[path or name].ids, (name, link)
        assert not page or len(page.ids) == len(set(page.ids)), f"{name}: an id occurs twice"

def test_the_code_of_a_page_is_the_file(shown):
    source, page = shown
    assert page.code == source and list(page.lines) == [*range(1, source.count("\n") + 1)]

def test_each_cited_equation_has_a_card_in_its_definition_at_a_line_that_cites_it(shown):
    source, page = shown
    cited = {line: set() for line in page.lines}
    for citation in citations(source):
        cited[citation.line].update(citation.numbers)
        section = page.lines[citation.line][1]  # None in the header: a card anywhere will do
        for number in citation.numbers:
            assert any(card[0] == number and section in (None, card[2]) for card in page.cards), (
                f"no card for Eq. {number} of line {citation.line}")
    for number, div, _ in page.cards:
        assert any(number in cited[n] for n, at in page.lines.items() if at[0] == div), number

def test_all_ninety_rows_have_what_EQUATIONS_md_has(site):
    index = site["index.html"]
    assert [i for i in index.ids if i.startswith("eq-")] == [f"eq-{n}" for n in range(1, 91)]
    for number, status, check, residual in ROWS:
        row = re.search(f'<article id="eq-{number}">.*?</article>', index.text, re.S)[0]
        assert "<math" in row and ('class="printed"' in row) == (status != "ok"), number
        assert f"#{check}" in row and residual.replace("<", "&lt;").replace(">", "&gt;") in row

def test_formulas_are_typeset_and_the_font_has_their_characters(site):
    ranges = re.search("unicode-range: (.*?);", (ROOT / "paper/pages.css").read_text(), re.S)[1]
    font = {chr(c) for first, last in re.findall(r"U\+(\w+)(?:-(\w+))?", ranges)
            for c in range(int(first, 16), int(last or first, 16) + 1)}
    plain = partial(unicodedata.normalize, "NFKC")
    italic = {plain(c) for c in font if "ITALIC" in unicodedata.name(c, "") or c == "\u210e"}
    for page in filter(None, site.values()):
        assert "merror" not in page.tags
        for tag, text in page.math:
            letter = tag == "mi" and len(text) == 1 and text.isalpha()  # which is shown in italics
            assert plain(text) in italic if letter else set(text) <= font - set("\\$`"), text

@pytest.mark.parametrize("text, numbers", [
    ("Eq. 4, 5 and 6; 7 games", [4, 5, 6]), ("Eq. 4-6, or Eq. 8", [4, 5, 6, 8]),
    ("Eq. 4 to\n    # 6", [4, 5, 6]), ("Equations 4, 6-8;\n    # 10 or 11", [4, 6, 7, 8, 10, 11]),
    ("as Eq. 4,\nx = 5  # 6", [4]), ("Eq. 4, 128 of Eq. N", [4]), ("(Eqs. 4, or 5)", [4, 5])])
def test_forms_of_citations(text, numbers):
    assert [n for c in citations(f"y = 1  # {text}\n") for n in c.numbers] == numbers

def test_a_missing_package_is_named_in_one_sentence():
    done = run(without=["math_core"])
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and ".[pages]" in done.stderr
