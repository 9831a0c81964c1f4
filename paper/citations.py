"""Where a source cites numbered equations of the paper, and what stands around each citation."""
import ast
import io
import re
import tokenize
from typing import NamedTuple

NUMBERS = re.compile(  # Eq. 1; Eq. 1, 2 or 3; Eq. 1-3; Eq. 1 to 3; Equations 1, 2-4 and 5; 6
    r"\bEq(?:s?\.|uation(s)?)~\d+"
    r"(?:(?:(?:,|(?(1);|,))(?:~(?:and|or))?~|~(?:and|or|to)~|-|–)(?:[1-8]?\d|90)\b)*"  # not 128
    .replace("~", r"[\s#]+"))  # a list may go on in the next line, also of a comment

class Citation(NamedTuple):
    """A number in a comment or string; the last one of a range stands for all before it too."""
    line: int  # counted from 1
    column: int  # of its first digit, counted from 0
    text: str  # its digits
    numbers: tuple  # the equations that it stands for: (65,), or for the 65 of 62-65 (63, 64, 65)
    comment: bool

def citations(source):
    """Every citation in the comments and strings of a Python source, in their order."""
    starts, prose, comments = [0], [], {}  # prose: the source with all code blotted out
    for line in source.splitlines(keepends=True):
        prose += [c if c.isspace() else "\0" for c in line]
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            first, last = (starts[line - 1] + column for line, column in (token.start, token.end))
            prose[first:last] = source[first:last]
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
    for cited in NUMBERS.finditer("".join(prose)):
        before = None
        for found in re.finditer(r"(\D+)(\d+)", cited[0]):
            number, at = int(found[2]), cited.start() + found.start(2)
            ranged = before is not None and re.fullmatch(r"-|–|[\s#]+to[\s#]+", found[1])
            numbers = tuple(range(before + 1, number + 1)) if ranged else (number,)
            line = source.count("\n", 0, at) + 1
            column = at - starts[line - 1]
            yield Citation(line, column, found[2], numbers, comments.get(line, at) <= column)
            before = number

class Script:
    """A source with its citations and the cards that they ask for.

    A place is the first and last line of a statement, or of the head of a definition with its
    docstring. A section is that of a top-level definition, or of what stands between two fences.
    """
    def __init__(self, name, source):
        self.name, self.source, self.lines = name, source, source.split("\n")[:-1]
        self.tree = ast.parse(source)
        self.title, *_ = (ast.get_docstring(self.tree) or name).splitlines()
        self.definitions = {}  # {(first line, last line): name}
        for node in self.tree.body:
            if hasattr(node, "decorator_list"):
                last = node.end_lineno
                while last < len(self.lines) and self.lines[last].startswith(" "):
                    last += 1  # a comment at its end
                self.definitions[first_line(node), last] = node.name
        self.parts = self.read_parts()
        self.places, self.citations = list(self.read_places()), list(citations(source))
        self.cards = self.read_cards()

    def read_parts(self):
        """(first line, last line, title) of what stands between fences of the first column."""
        starts = [(1, "")]
        for number, line in enumerate(self.lines, 1):
            if fence := re.match(r"# === (.*) ===", line):
                ended = fence[1].startswith("end ")
                starts.append((number + 1, "") if ended else (number, fence[1]))
        ends = [first - 1 for first, _ in starts[1:]] + [len(self.lines)]
        return [(first, end, title) for (first, title), end in zip(starts, ends) if first <= end]

    def read_places(self):
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Module, ast.stmt)):
                first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", 1)
                if body := getattr(node, "body", None):
                    text = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
                    last = body[0].end_lineno if text else max(first, first_line(body[0]) - 1)
                yield first, last

    def around(self, line):
        """The place and the section of a line."""
        place = max([p for p in self.places if p[0] <= line <= p[1]] or [(line, line)],
                    key=lambda p: p[1] - p[0])
        sections = [*self.definitions, *((first, last) for first, last, _ in self.parts)]
        return place, next(s for s in sections if s[0] <= line <= s[1])

    def in_header(self, citation):
        return not citation.comment and self.around(citation.line)[0][0] == 1

    def read_cards(self):
        """{place: {number: lines that cite it}}: where each equation stands.

        In a section it stands once: at the first statement with a comment that cites it, else at
        the docstring that does. What only the docstring of the file cites stands there.
        """
        homes, header, cards = {}, [], {}
        for citation in sorted(self.citations, key=lambda c: not c.comment):
            if self.in_header(citation):
                header.append(citation)
                continue
            place, section = self.around(citation.line)
            for number in citation.numbers:
                homes.setdefault((section, number), (place, []))[1].append(citation.line)
        elsewhere = {number for _, number in homes}
        for citation in header:
            for number in set(citation.numbers) - elsewhere:
                place = self.around(citation.line)[0]
                homes.setdefault((None, number), (place, []))[1].append(citation.line)
        for (_, number), (place, lines) in homes.items():
            cards.setdefault(place, {})[number] = sorted(set(lines))
        return cards

    def home(self, citation):
        """The place of the card to which a citation leads, None if there is none."""
        number, header = int(citation.text), self.in_header(citation)
        return min((place for place, cards in self.cards.items() if number in cards
                    and (header or citation.line in cards[number])), default=None)

def first_line(node):
    return min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
