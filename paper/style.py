"""The look of every picture here: panels, curves over seeds, and names beside the lines.

A picture is 8.5 inches wide. A README shows it 830 pixels wide, where its text is then 9 points.
Lines differ in brightness and dashes, so that they are told apart in gray.
"""
import textwrap

import numpy as np

WIDTH, DPI, SIZE = 8.5, 140, 9.5  # inches, dots per inch, points
STYLES = [("#1f2f5f", "-"), ("#dd7711", (0, (5, 1.5))), ("#a8326a", "-."), ("#4f9fd8", ":"),
          ("#2f8f5b", (0, (5, 1, 1, 1, 1, 1))), ("#8a8a8a", (0, (9, 3)))]
MARKERS = "oD^svP"
GRAY = "0.35"
FLOAT32 = 2.0**-23  # its resolution: a smaller 1 - cosine is not seen
RC = {"font.size": SIZE, "axes.titlesize": 10, "axes.titlelocation": "left",
      "axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False,
      "axes.edgecolor": "0.6", "axes.linewidth": 0.8, "xtick.color": "0.6", "ytick.color": "0.6",
      "xtick.labelcolor": GRAY, "ytick.labelcolor": GRAY, "axes.labelcolor": "0.15",
      "lines.linewidth": 1.8, "svg.hashsalt": "figures"}  # or every SVG has new names

def panels(down, across, height, **flags):
    """A figure of so many panels, its height in inches, and the panels in an array."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams.update(RC)
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(down, across, figsize=(WIDTH, height), squeeze=False,
                                layout="constrained", **flags)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, axes

def over_seeds(curves):
    """x, and mean, lowest and highest y of those curves (x, y) that have come to x."""
    curves = [np.array([point for point in zip(*curve) if point[1] == point[1]]).reshape(-1, 2).T
              for curve in curves]
    curves = [curve for curve in curves if curve.size]
    x = np.unique(np.concatenate([curve[0] for curve in curves]))
    y = np.array([np.interp(x, *curve, np.nan, np.nan) for curve in curves])
    return x, np.nanmean(y, 0), np.nanmin(y, 0), np.nanmax(y, 0)

def band(ax, k, label, x, middle, low, high):
    """A line in the k-th style within its spread; a single point has a marker."""
    color, dashes = STYLES[k]
    ax.plot(x, middle, color=color, ls=dashes, label=label,
            marker=MARKERS[k] if len(x) == 1 else None)
    ax.fill_between(x, low, high, color=color, alpha=0.18, lw=0)

def gradients(cosine, gap, runs):
    """Two panels: how far apart the gradients of both rules of pgql_equiv.py are along its runs.

    runs: by the number of its style, the name of a rule and a function that returns the curves
    (x, y) of a column.
    """
    for ax, column, label in ((cosine, "cosine", "{} runs"), (gap, "gap", "gap, {} runs"),
                              (gap, "gap_error", "error, {} runs")):
        for k, (name, logs) in runs.items():
            curves = [(x, np.log10(np.maximum(1 - y, FLOAT32) if ax is cosine else y))
                      for x, y in logs(column)]
            x, *y = over_seeds(curves)
            band(ax, k, label.format(name), x, *np.power(10, y))
    level(cosine, 1, "orthogonal")
    level(cosine, 1 - np.cos(np.pi / 180), "1 degree apart")
    level(gap, 1, "policy gradient")
    level(gap, FLOAT32, "float32 resolution")
    cosine.set(title="Direction of the two gradients", ylabel="1 - cosine", yscale="log")
    gap.set(title="Gap, and error of its closed form", yscale="log",
            ylabel="relative to the\npolicy gradient")

def dots(ax, k, x, y):
    """Points in the k-th style."""
    ax.plot(x, y, MARKERS[k], color=STYLES[k][0], ms=5, mec="w", mew=0.6)

def note(figure, text):
    """What lines and shading are, below the panels."""
    figure.supxlabel(text, fontsize=SIZE, color=GRAY)

def level(ax, y, label, dashes=":"):
    """A score to compare with."""
    ax.axhline(y, color=GRAY, ls=dashes, lw=1, label=label, zorder=1)

def names(ax, width):
    """The name of each line, beside the panel or, if it ends early, there; none overlap."""
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    texts = ["\n".join(textwrap.fill(part, width) for part in line.get_label().split("\n"))
             for line in lines]
    ends = [line.get_transform().transform(line.get_xydata()[-1]) for line in lines]
    x, y = ax.transAxes.inverted().transform(ends).T
    late = x > 0.8
    at = np.where(late, y, y + np.where(y > 0.8, -0.08, 0.08))
    height = [1.25 * SIZE / 72 * ax.figure.dpi / ax.bbox.height * (1 + text.count("\n"))
              for text in texts]
    orders = [[i for i in np.argsort(at, kind="stable") if late[i] == group] for group in (0, 1)]
    for i, j in 200 * [pair for order in orders for pair in zip(order, order[1:])]:
        overlap = max(0, (height[i] + height[j]) / 2 - (at[j] - at[i]))
        at[i] -= overlap / 2
        at[j] += overlap / 2
    for i, line in enumerate(lines):
        leader = dict(arrowstyle="-", color=line.get_color(), lw=0.7, alpha=0.5, shrinkA=1,
                      shrinkB=1, relpos=(0, 0.5))
        ax.annotate(texts[i], (x[i], y[i]), (1.05 if late[i] else x[i] + 0.02, at[i]),
                    "axes fraction", "axes fraction", leader, annotation_clip=False,
                    color=line.get_color(), va="center")

def save(figure, *paths, width=15):
    """Names the lines if there is no legend, and writes files that depend on the data alone."""
    figure.draw_without_rendering()  # limits and sizes are then known
    for ax in figure.axes:
        if not figure.legends:
            names(ax, width)
    for path in paths:
        no_date = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=DPI, metadata=no_date)
