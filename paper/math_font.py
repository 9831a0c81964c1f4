"""Makes paper/math.woff2, the characters of formulas from Latin Modern Math: needed once.

    pip install fonttools brotli
    python paper/math_font.py /usr/share/texmf/fonts/opentype/public/lm-math/latinmodern-math.otf
"""
import re
import sys
from pathlib import Path

from fontTools import subset

HERE = Path(__file__).resolve().parent

def main(source):
    ranges = re.search(r"unicode-range:(.*?);", (HERE / "pages.css").read_text(), re.S)[1]
    characters = [c for first, last in re.findall(r"U\+(\w+)(?:-(\w+))?", ranges)
                  for c in range(int(first, 16), int(last or first, 16) + 1)]
    options = subset.Options(flavor="woff2", hinting=False, layout_features=["ssty"])
    font = subset.load_font(source, options)
    missing = [f"U+{c:04X}" for c in characters if c not in font.getBestCmap()]
    if missing:
        sys.exit(f"{source} lacks {', '.join(missing)}")
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=characters)
    subsetter.subset(font)
    for record in font["name"].names:  # the license asks that a changed font has a name of its own
        record.string = re.sub(r"Latin ?Modern ?Math", "Page Math", str(record))
    subset.save_font(font, HERE / "math.woff2", options)

if __name__ == "__main__":
    main(sys.argv[1])
