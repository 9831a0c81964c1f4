"""The paper beside the code: a page for each script, and an index of all equations.

    pip install -e '.[pages]'
    python paper/pages.py               writes site/; open site/index.html, no network is needed

On a page each line that cites an equation has it beside it, and a misprint beside its correction.
The equations are those of EQUATIONS.md; which line cites which is read from the comments and
docstrings of the scripts. The checks of tests/equations have such pages too.
"""
import argparse
import ast
import itertools
import re
import shutil
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

try:
    from math_core import LatexToMathML
    from pygments.lexers import PythonLexer
    from pygments.token import Comment, Keyword, Name, Number, Operator, String
except ImportError as missing:
    sys.exit(f"paper/pages.py needs the package {missing.name}: pip install -e '.[pages]'")

from citations import Script

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "a2c_naive", "a2c_proper", "soft_dqn", "pgql_equiv", "natural_pg_damped"
CHECKS = "bandit", "mdp", "gradients", "natural", "related"
PAPER = "https://arxiv.org/abs/1704.06440"

# === EQUATIONS.md ===
class Row(NamedTuple):
    """An equation's row; the cells from equation to residual are Markdown, as they stand there."""
    number: int
    section: str
    lead: str  # TeX of the left side of its chain, "" unless it begins with "="
    equation: str
    status: str
    note: str
    computed_by: str
    check: str
    residual: str

    @property
    def misprinted(self):
        return "misprint" in self.status

def read_rows(text):
    """The rows of EQUATIONS.md by number."""
    rows, section, left = {}, "", ""
    for line in text.splitlines():
        section = line[3:] if line.startswith("## ") else section
        if re.match(r"\| \d+ \| ", line):
            number, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
            continued = cells[0].startswith("$`=")
            if not continued:
                tex = pieces(cells[0][2:].split("`$")[0])
                left = "".join(itertools.takewhile(lambda piece: piece[:4] != "{} =", tex))
            rows[int(number)] = Row(int(number), section, left if continued else "", *cells)
    return rows

def notation(text):
    """The symbols at the end of EQUATIONS.md: a sentence and a table."""
    sentence, *lines = text.split("## Notation\n\n")[1].splitlines()
    cells = [[prose(cell.strip()) for cell in line.strip("|").split(" | ")]
             for line in lines if line.startswith("| ")]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in cells[0])
    body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in cells[1:])
    return (f"<p>{prose(sentence)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

# === formulas ===
CONVERT = LatexToMathML().convert_with_local_state
OPENING = "(", "[", r"\lbrace", "{", "=", "+", "-", ",", "^", "_"  # no sum begins behind these
LONGEST = 30  # characters, roughly, of a piece that is not cut further

def pieces(tex):
    """TeX cut before relations, sums, differences and quotients: where a line may be broken.

    First outside all brackets, then inside them as far as a piece is long.
    """
    tokens, levels = re.findall(r"\\[a-zA-Z]+|\\.|\S|\s+", "{} " * (tex[0] == "=") + tex), []
    braces, brackets, before, given = 0, 0, "(", 9
    for token in tokens:
        operator = token in ("=", "+", "-", "/", r"\approx") and not braces and brackets < given
        levels.append(brackets + (token == "/") if operator and before not in OPENING else 9)
        braces += (token == "{") - (token == "}")
        brackets += (token in OPENING[:3]) - (token in (")", "]", r"\rbrace"))
        given = brackets if token == r"\mid" else given if brackets >= given else 9
        before = token.strip() or before

    def cut(first, last, level):
        starts = [i for i in range(first + 1, last) if levels[i] <= level]
        if starts:
            ends = zip([first, *starts], [*starts, last])
            return [piece for a, b in ends for piece in cut(a, b, level)]
        text = "".join(tokens[first:last])
        if level < 3 and len(re.sub(r"\\\w+|[{}_^\s]", "x", text).replace("xx", "x")) > LONGEST:
            return cut(first, last, level + 1)
        return ["{} " * (first > 0) + text]  # something before it, or a minus would be a sign

    return cut(0, len(tokens), 0)

def math(tex, display=False):
    """TeX as MathML that stands in a line of text."""
    html = CONVERT(tex, displaystyle=display).replace(' display="block"', ' displaystyle="true"')
    return html.replace('<mo stretchy="false">¯</mo>', '<mo stretchy="false" class="bar">¯</mo>')

def formula(tex):
    """TeX as pieces of MathML between which a line may be broken, each whole in itself."""
    parts = pieces(tex.replace(r"\tfrac{\pi", r"\frac{\pi"))  # ratios of policies would be tiny
    for i, part in enumerate(parts):
        if part.count(r"\left") != part.count(r"\right"):  # a bracket opens here, closes later
            part = part.replace(r"\left", r"\Bigl")  # in {...{}} it is large also below an exponent
            parts[i] = re.sub(r"\\right *(\\\w+|.)", r"{\\Bigr\1{}}", part)
    return "<wbr>".join(f'<span class="m">{math(part, display=True)}</span>' for part in parts)

def prose(text, typeset=math):
    """Markdown with $`TeX`$, `code` and links to functions, as HTML."""
    def html(part):
        if part.startswith("$`"):
            return typeset(part[2:-2])
        if part.startswith("[`"):
            name, path = part[2:-1].split("`](")
            return f'<a href="{page_of(path)}#{name}"><code>{name}</code></a>'
        if part.startswith("`"):
            return f"<code>{escape(part[1:-1], quote=False)}</code>"
        return re.sub(r"\bEq\. (\d+)", r'<a href="index.html#eq-\1">Eq.&nbsp;\1</a>',
                      escape(part, quote=False))
    parts = map(html, re.split(r"(\$`.*?`\$|\[`\w+`\]\(.*?\)|`.*?`)", text))
    return re.sub(r"(</math>(?:</span>)?)(?=[.,;:)])", r"\1&NoBreak;", "".join(parts))

def equation(row):
    """An equation, corrected, after the left side of its chain."""
    lead = f'<span class="m lead">{math(row.lead, display=True)}</span><wbr>' if row.lead else ""
    return f'<p class="eq">{lead}{prose(row.equation, formula)}</p>'

def misprint(row, sentences=None):
    """What the paper prints, struck out, and why it is wrong, in at most so many sentences."""
    if not row.misprinted:
        return ""
    printed, *why = re.split(r"(?<=\.) (?=[A-Z$])", row.note.removeprefix("printed: "))
    struck = prose(printed.removesuffix("."), formula)
    if printed.startswith("$`"):
        struck = re.sub(r"^.*</span>", r"<del>\g<0></del>", struck)
    return (f'<p class="printed"><b>printed</b> {struck}</p>'
            f'<p class="why">{prose(" ".join(why[:sentences]))}</p>')

def badge(row):
    return ' <span class="badge">misprint</span>' if row.misprinted else ""

# === a script ===
STYLES = ((String.Doc, "c"), (Comment, "c"), (String, "s"), (Keyword, "k"), (Operator.Word, "k"),
          (Number, "n"), (Name.Function, "f"), (Name.Class, "f"))

def highlighted(script):
    """Each line of code as HTML.

    The numbers of cited equations are links to their cards, and calls of the script's functions to
    these, with the first line of the docstring as their title.
    """
    links = {(c.line, c.column): f'<a href="#eq-{c.text}-{place[0]}" aria-label="Eq. {c.text}">'
             f"{c.text}</a>" for c in script.citations if (place := script.home(c))}
    about = {node.name: (ast.get_docstring(node) or node.name).split("\n")[0]
             for node in script.tree.body if isinstance(node, ast.FunctionDef)}
    tokens = [*PythonLexer(ensurenl=False, stripnl=False).get_tokens(script.source), (None, "")]
    lines, column, before = [""], 0, ""
    for (kind, text), (_, following) in zip(tokens, tokens[1:]):
        style = next((name for of, name in STYLES if kind in of), None)
        for i, part in enumerate(text.split("\n")):
            if i:
                lines.append("")
                column = 0
            html = "".join(links.get((len(lines), column + m.start()), escape(m[0], quote=False))
                           for m in re.finditer(r"\d+|\D+", part))
            if kind is Name and text in about and before != "." and following[:1] == "(":
                html = f'<a class="call" href="#{text}" title="{escape(about[text])}">{text}</a>'
            lines[-1] += f'<span class="{style}">{html}</span>' if style and part else html
            column += len(part)
        before = text
    return lines[:len(script.lines)]

def card(row, place, lines, first):
    """An equation beside the lines that cite it; the misprint is folded if not the first time."""
    at = ", ".join(f'<a href="#L{n}" aria-label="line {n}">{n}</a>' for n in lines)
    wrong = misprint(row, sentences=1)
    if wrong and not first:
        wrong = f"<details><summary>as printed</summary>{wrong}</details>"
    return (f'<div class="card" role="note" aria-label="Equation {row.number}" '
            f'id="eq-{row.number}-{place[0]}"><p class="head">'
            f'<a class="no" href="index.html#eq-{row.number}">Eq. {row.number}</a>{badge(row)}'
            f'<span class="at">line{"s" * (len(lines) > 1)} {at}</span></p>'
            f"{equation(row)}{wrong}</div>\n")

def folded(script, first, last, title):
    """What stands before and after lines that are folded, unless there are equations in them."""
    names = [f"<code>{n}</code>" for (a, b), n in script.definitions.items() if first <= a <= last]
    state = " open" if any(first <= place[0] <= last for place in script.cards) else ""
    return (f'<details class="fold"{state}><summary>{title} <span>lines {first} to {last}'
            f'{": " * bool(names)}{", ".join(names)}</span></summary>', "</details>")

def wraps(script, rows):
    """(first line, last line, HTML before, HTML after) of all that is around lines of code."""
    for first, last, title in script.parts:
        heading = title and f"<h2>{title[0].upper()}{title[1:]}</h2>"
        yield first, last, *(folded(script, first, last, heading) if title.startswith("shared: ")
                             else (f'<div class="part">{heading}', "</div>"))
    inner = [n for n, line in enumerate(script.lines, 1) if re.match(r" +# === ", line)]
    for first, last in zip(inner[::2], inner[1::2]):
        title = script.lines[first - 1].strip("# =").capitalize()
        yield first, last, *folded(script, first, last, title)
    imports = [n for node in script.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
               for n in (node.lineno, node.end_lineno)]
    if imports:
        yield imports[0], imports[-1], *folded(script, imports[0], imports[-1], "Imports")
    for section, name in script.definitions.items():
        pin = ' class="pin"' * pinned(script, section)
        yield *section, f'<section id="{name}"{pin}><h3 class="hidden">{name}</h3>', "</section>"
    seen = set()
    for place, cards in sorted(script.cards.items()):
        html = "".join(card(rows[n], place, at, n not in seen) for n, at in cards.items()
                       if n in rows)
        seen.update(cards)
        yield *place, f'<div class="cited">{html}', "</div>"

def pinned(script, section):
    """Whether a definition is short and its cards are not: it then stays in view beside them."""
    (first, last), cards = section, script.cards.items()
    return last - first < min(32, 5 * sum(len(x) for p, x in cards if first <= p[0] <= last))

def listing(script, rows):
    """The code in full, with all that is wrapped around its lines."""
    waiting = sorted(wraps(script, rows), key=lambda wrap: (wrap[0], -wrap[1]))
    pins = [section for section in script.definitions if pinned(script, section)]
    html, opened, code = [], [], []

    def flush(last):
        """Writes the lines up to here; where they are pinned, with those above and below them."""
        first, style, back = last - len(code) + 1, "", ""
        for a, b in pins:
            if a <= first and last <= b:
                style = f' style="--above:{first - a};--below:{b - last}"'
                back = f"<div{style}></div>"  # takes back the margin for the lines below
        html.extend([f"<pre{style}>", *code, f"</pre>{back}"] if code else [])
        code.clear()

    for n, (line, shown) in enumerate(zip(script.lines, highlighted(script)), 1):
        while waiting and waiting[0][0] == n:
            flush(n - 1)
            html.append(waiting[0][2])
            opened.append(waiting.pop(0))
        indent = min(24, len(line) - len(line.lstrip()))
        style = f' style="--i:{indent}"' if indent else ""
        code.append(f'<span class="l" id="L{n}" data-n="{n}"{style}>{shown}\n</span>')
        while opened and opened[-1][1] == n:
            flush(n)
            html.append(opened.pop()[3] + "\n")
    return "".join(html)

# === pages ===
def page_of(path):
    """The file name of the page of a source."""
    return Path(path).stem + ".html"

def page(title, name, main, symbols):
    """A whole page; name is its file's."""
    links = [("index.html", "All equations")]
    links += [(page_of(script), f"<code>{script}</code>") for script in SCRIPTS]
    entries = "".join(f'<li><a href="{file}"{" aria-current=page" * (file == name)}>{text}</a></li>'
                      for file, text in links)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="pages.css">
</head>
<body>
<a class="skip" href="#page-content">Skip to content</a>
<header>
<nav aria-label="Pages"><ul>{entries}</ul></nav>
<details class="symbols"><summary>Symbols</summary><div>{symbols}</div></details>
</header>
<main id="page-content">
{main}
</main>
<footer><p>Made by <code>paper/pages.py</code> from EQUATIONS.md and the sources. The paper:
<a href="{PAPER}">arXiv:1704.06440</a>.</p></footer>
</body>
</html>
"""

def script_page(script, rows, symbols):
    """The page of a script or of checks; what its docstring says of symbols stands above theirs."""
    fields = re.findall(r"^(Shapes|Symbols): +(.*(?:\n +.*)*)",
                        ast.get_docstring(script.tree) or "", re.M)
    terms = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in fields)
    terms = terms and f"<dl>{terms}</dl>"
    main = (f'<h1><code>{script.name}</code></h1><p class="lead">{escape(script.title)}</p>\n'
            f'<div class="listing">{listing(script, rows)}</div>')
    return page(script.name, page_of(script.name), main, terms + symbols)

def uses(number, script):
    """The lines of a script that cite an equation, as links with the code."""
    found = [c for c in script.citations if number in c.numbers]
    found = [c for c in found if not script.in_header(c)] or found
    for line, comment in {c.line: c.comment for c in found}.items():
        code = script.lines[line - 1].split("  # ")[0].strip()
        name = next((f"<code>{n}</code>" for (a, b), n in script.definitions.items()
                     if a <= line <= b), "the file")
        what = (f'<code class="line">{escape(code, quote=False)}</code>'
                if comment and not code.startswith("#") else f"in the description of {name}")
        yield (f'<li><a href="{page_of(script.name)}#L{line}">{script.name}, line {line}</a> '
               f"{what}</li>")

def index_row(row, scripts):
    """An equation's row in the index."""
    note = misprint(row) or (f'<p class="why">{prose(row.note)}</p>' if row.note else "")
    lines = "".join(html for script in scripts for html in uses(row.number, script))
    used, through = f"<ul>{lines}</ul>" if lines else "", ""
    if row.computed_by != "-":
        through = ", through " + re.sub(
            r"`(\w+)` \[`(\w+)`\]\(\S+\)",
            r'<a href="\1.html#\2"><code>\1.\2</code></a>', row.computed_by)
    elif not lines:
        used = "<p>No script computes it.</p>"
    return (f'<article id="eq-{row.number}"><h3><a href="#eq-{row.number}">Eq. {row.number}</a>'
            f'{badge(row)}</h3><div class="formula">{equation(row)}{note}</div><div class="code">'
            f"{used}<p>Checked by {prose(row.check)}{through}.</p>"
            f"<p>Residual {escape(row.residual)}</p></div></article>\n")

def index(rows, scripts, symbols):
    """The page of all equations, by section."""
    cards = "".join(f'<li><a href="{page_of(s.name)}"><code>{s.name}</code></a>'
                    f"<p>{escape(s.title)}</p></li>" for s in scripts)
    jump, body = "", ""
    for section in dict.fromkeys(row.section for row in rows.values()):
        of = [row for row in rows.values() if row.section == section]
        numbers = " ".join(
            f'<a href="#eq-{row.number}"{" class=wrong" * row.misprinted} aria-label='
            f'"Eq. {row.number}{", misprinted" * row.misprinted}">{row.number}</a>' for row in of)
        jump += f"<li><span>{escape(section)}</span> {numbers}</li>"
        body += f"<h2>{escape(section)}</h2>" + "".join(index_row(row, scripts) for row in of)
    wrong = sum(row.misprinted for row in rows.values())
    return page("The paper beside the code", "index.html", f"""<h1>The paper beside the code</h1>
<p class="lead"><cite>Equivalence Between Policy Gradients and Soft Q-Learning</cite> (Schulman,
Chen, Abbeel 2017) has {len(rows)} numbered equations. {wrong} are misprinted. Five scripts compute
them, and each script has a page on which the equations stand beside the code.</p>
<ul class="scripts">{cards}</ul>
<nav class="jump" aria-label="Equations"><ul>{jump}</ul></nav>
<p class="key">Each row has the equation as it should read, the lines of code that cite it, and the
check that compares the two in float64. The residual is the bound of the check and, in brackets, the
largest value that was measured. For a misprint the printed form must fail by a margin.</p>
{body}""", symbols)

def build(out):
    """Writes all pages into a folder."""
    text = (ROOT / "EQUATIONS.md").read_text("utf-8")
    rows, symbols = read_rows(text), notation(text)
    paths = [f"{name}.py" for name in SCRIPTS] + [f"tests/equations/{name}.py" for name in CHECKS]
    scripts = [Script(Path(path).name, (ROOT / path).read_text("utf-8")) for path in paths]
    out.mkdir(parents=True, exist_ok=True)
    for file in ("pages.css", "math.woff2"):
        shutil.copy(ROOT / "paper" / file, out)
    for script in scripts:
        (out / page_of(script.name)).write_text(script_page(script, rows, symbols), "utf-8")
    html = index(rows, scripts[:len(SCRIPTS)], symbols)
    (out / "index.html").write_text(html, "utf-8")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder (default: site)")
    out = parser.parse_args().out
    build(out)
    print(f"wrote {out / 'index.html'}")
