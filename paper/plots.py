"""Draws a figure of the paper, and tabulates its final scores, from the CSVs that were collected.

    python paper/plots.py 1 2 3 4 5   # again from results/paper, what lies there

For figure k it writes figure<k>.csv, the curves as drawn; figure<k>.png and .svg; and scores<k>.md
and .csv, the final scores beside the published ones and what the grid still lacks. The CSVs and the
table depend on the collected CSVs alone, byte for byte.
"""
import csv
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import style  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GRIDS = json.loads(Path(__file__).with_name("grids.json").read_text())
for grid in GRIDS["figures"].values():  # "flags": of every arm of a figure, on top of the arm's
    grid.update(games=grid.get("games", GRIDS["games"]), flags=grid.get("flags", []))
RESULTS = ROOT / "results" / "paper"
POINTS = 201  # of a drawn curve
RESAMPLES = 10_000  # of the bootstrap

def short(frames):
    """A number of frames in three digits: 2512000 -> 2.51M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if frames >= size:
            return f"{frames / size:.3g}{unit}"
    return str(frames)

def exact(frames):
    """The shortest exact name of a number of frames, part of a folder's name: 40000000 -> 40M."""
    for unit, size in (("M", 10**6), ("k", 10**3)):
        if frames % size == 0:
            return f"{frames // size}{unit}"
    return str(frames)

def arm_folder(figure, command):
    """The folder of an arm, from its script and flags: arms of two figures may be the same.

    The figure stands for the flags that all its arms share, where it has some.
    """
    script, *flags = command
    shared = [f"figure{figure}"] * bool(GRIDS["figures"][figure]["flags"])
    return "_".join([*shared, Path(script).stem, *(flag.removeprefix("--") for flag in flags)])

def runs(figure, results, extra=()):
    """The collected runs of a figure by (game, arm, name of the horizon): [(seed, folder), ...]."""
    found, grid = {}, GRIDS["figures"][figure]
    for arm, command in grid["arms"].items():
        arm_runs = f"{arm_folder(figure, (*command, *extra))}/*/*/seed*"
        for folder in sorted(Path(results).glob(arm_runs)):
            game, horizon = folder.parts[-3:-1]
            if (folder / "eval.csv").exists() and game in grid["games"]:
                found.setdefault((game, arm, horizon), []).append((int(folder.name[4:]), folder))
    return {key: sorted(of) for key, of in found.items()}

def evaluations(folder):
    """Frames, hours of training and mean scores of a run's evaluations; three arrays."""
    with open(folder / "eval.csv", newline="") as f:
        rows = [(4 * int(row["step"]), float(row["wall_time"]) / 3600, float(row["score_mean"]))
                for row in csv.DictReader(f)]
    return np.array(rows).reshape(-1, 3).T

def curves(figure, results, extra=()):
    """The curves of a figure, as rows of its CSV: mean and deviation over the seeds.

    At each point the means are over the seeds that have come that far, of which it gives the
    number. Between evaluations scores and hours are interpolated.
    """
    for (game, arm, horizon), of in runs(figure, results, extra).items():
        seeds = [found for _, folder in of if (found := evaluations(folder)).size]
        if not seeds:
            continue
        last = max(frames[-1] for frames, *_ in seeds)
        first = min(frames[0] for frames, *_ in seeds)
        for x in np.linspace(first, last, POINTS if last > first else 1):
            there = [of for of in seeds if of[0][0] <= x <= of[0][-1]]
            hours = [np.interp(x, frames, hours) for frames, hours, _ in there]
            y = [np.interp(x, frames, score) for frames, _, score in there]
            if y:
                yield dict(game=game, arm=arm, horizon=horizon, frames=round(x), seeds=len(y),
                           hours=f"{np.mean(hours):.6g}", mean=f"{np.mean(y):.6g}",
                           std=f"{np.std(y):.6g}")

def interval(scores):
    """The 95% bootstrap interval of a mean over seeds, None for a single one."""
    if len(scores) < 2:
        return None
    drawn = np.random.default_rng(0).choice(scores, (RESAMPLES, len(scores)))
    return tuple(np.percentile(drawn.mean(1), (2.5, 97.5)))

def final_scores(figure, results, extra=()):
    """A row for each game, arm and horizon: the last evaluations of the seeds."""
    grid = GRIDS["figures"][figure]
    for (game, arm, horizon), of in sorted(runs(figure, results, extra).items()):
        seeds = [found for _, folder in of if (found := evaluations(folder)).size]
        scores = [float(score[-1]) for *_, score in seeds]
        if not scores:
            continue
        low, high = interval(scores) or (math.nan, math.nan)
        row = dict(game=game, arm=arm, horizon=horizon, seeds=len(scores),
                   of_seeds=grid["seeds"], frames=round(min(frames[-1] for frames, *_ in seeds)),
                   of_frames=grid["frames"], mean=np.mean(scores),
                   std=np.std(scores, ddof=1) if len(scores) > 1 else math.nan, low=low, high=high)
        yield {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}

def score_table(figure, rows):
    """The lines of scores<k>.md."""
    grid = GRIDS["figures"][figure]
    sources = GRIDS["published"][grid["published"]]
    own, frames = [row for row in rows if row["horizon"] == exact(grid["frames"])], grid["frames"]
    begun, others = (sum(int(row["seeds"]) for row in of) for of in (
        own, [row for row in rows if row not in own]))
    complete = sum(int(row["seeds"]) for row in own if int(row["frames"]) >= frames)
    yield (f"Of the {len(grid['arms']) * len(grid['games']) * grid['seeds']} runs of "
           f"{exact(frames)} frames: begun {begun}, complete {complete}."
           + f" On other schedules: {others}." * (others > 0))
    yield ""
    yield ("| game | arm | seeds | frames (decays over) | final score | deviation over seeds "
           "| 95% interval | " + " | ".join(f"[{i}]" for i in range(1, len(sources) + 1)) + " |")
    yield "|---" * (7 + len(sources)) + "|"
    for row in rows:
        published = [source["scores"].get(row["game"], "-") for source in sources]
        several = int(row["seeds"]) > 1
        yield " | ".join(map(str, (
            f"| {row['game']}", row["arm"], f"{row['seeds']} of {row['of_seeds']}",
            f"{short(int(row['frames']))} ({row['horizon']})", f"{float(row['mean']):.1f}",
            f"{float(row['std']):.1f}" if several else "-",
            f"{float(row['low']):.1f} to {float(row['high']):.1f}" if several else "-",
            *published))) + " |"
    yield ""
    if "note" in grid:
        yield grid["note"]
    yield ("Final score: mean of the last evaluation, 20 full games a seed unless eval.csv says "
           "otherwise; the interval is a bootstrap over seeds. Published, at 40M frames:")
    for i, source in enumerate(sources, 1):
        yield f"[{i}] {source['source']}" + (";" if i < len(sources) else ".")

def panel(ax, figure, game, rows, over="frames"):
    """The curves of a game, between the scores of a random policy and a published one.

    over is what they are drawn over, "frames" or "hours".
    """
    grid, lines = GRIDS["figures"][figure], {}
    random, published = GRIDS["random"], GRIDS["published"][grid["published"]][0]
    for row in rows:
        if row["game"] == game:
            lines.setdefault((row["arm"], row["horizon"]), []).append(
                [float(row[k]) for k in (over, "mean", "std")])
    for (arm, horizon), line in lines.items():
        x, mean, std = np.array(line).T
        x /= 1e6 if over == "frames" else 1
        name = "damped Q" if arm == "natural" else arm
        if horizon != exact(grid["frames"]):
            name += f", decays over {horizon}"
        style.band(ax, list(grid["arms"]).index(arm), name, x, mean, mean - std, mean + std)
    # with both in sight, noise does not fill the panel
    for of, name, dashes in ((random, "random policy", ":"),
                             (published, f"{grid['published']} after 40M frames", "--")):
        if game in of["scores"]:
            source = re.split(r",| \(", of["source"])[0]
            style.level(ax, of["scores"][game], f"{name}\n({source})", dashes)
    ax.set(xlabel="million frames" if over == "frames" else "hours of training", xlim=0)

def picture(figure, rows, gradients):
    """The figure from the rows of its CSV: one panel a game, as in the paper.

    gradients are the arms of pgql_equiv.py with their logs. With a single game two more panels show
    how far apart the gradients of both rules are or, where the grid asks for it, one more the
    scores over hours.
    """
    grid = GRIDS["figures"][figure]
    games = [game for game in grid["games"] if any(row["game"] == game for row in rows)]
    more = 0 if len(games) > 1 else 2 if gradients else 1 if grid.get("hours") else 0
    across = min(3, len(games))
    down = math.ceil(len(games) / across) + more
    height = 2.4 * down + 1.5 if across > 1 or more else 4
    drawn, axes = style.panels(down, across, height, sharex=more == 2)
    for ax, game in zip(axes.flat, games):
        panel(ax, figure, game, rows)
        ax.set_title(f"{game}: {grid['title']}" if across == 1 else game)
    for ax in axes.flat[len(games) + more:]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("score")
    if more == 1:
        panel(axes[1, 0], figure, games[0], rows, over="hours")
    if more == 2:
        axes[0, 0].set_xlabel("")
        style.gradients(axes[1, 0], axes[2, 0], gradients)
        axes[2, 0].set_xlabel("million frames")
    seeds = max(int(row["seeds"]) for row in rows)
    style.note(drawn, "Evaluations over full games, " + (
        f"mean and standard deviation over {seeds} seeds." if seeds > 1 else "one seed.")
        + " Gradients: each batch that was compared." * (more == 2))
    if across > 1:  # else the lines are named beside the panel
        named = {label.replace("\n", " "): handle for ax in axes.flat for handle, label in zip(
            *ax.get_legend_handles_labels())}
        drawn.legend(named.values(), named, loc="outside upper center", frameon=False,
                     ncols=math.ceil(len(named) / 3), handlelength=3, title=grid["title"],
                     title_fontproperties=dict(weight="bold"))
    return drawn

def compared(figure, results, extra=()):
    """Of the arms of pgql_equiv.py: {number of the arm: (name, function of a column's curves)}."""
    arms, folders = GRIDS["figures"][figure]["arms"], {}
    for (_, arm, _), of in runs(figure, results, extra).items():
        if arms[arm][0] == "pgql_equiv.py":
            folders.setdefault(arm, []).extend(folder for _, folder in of)

    def logs(arm, name):
        for folder in folders[arm]:
            with open(folder / "metrics.csv", newline="") as f:
                rows = [(float(row["step"]), float(row[name])) for row in csv.DictReader(f)]
            x, y = np.array(rows).reshape(-1, 2).T
            yield 4 * x / 1e6, y

    return {list(arms).index(arm): (arm, partial(logs, arm)) for arm in folders}

def draw(figure, results=RESULTS, out=None, extra=()):
    """Writes what the module's docstring lists to the folder `out`; returns the paths.

    extra are flags that the runs had beside those of the arms.
    """
    out, rows = Path(out or results), list(curves(figure, results, extra))
    out.mkdir(parents=True, exist_ok=True)
    if not rows:
        return []
    final = list(final_scores(figure, results, extra))
    for name, table in (("figure", rows), ("scores", final)):
        with open(out / f"{name}{figure}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, table[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    (out / f"scores{figure}.md").write_text("\n".join(score_table(figure, final)) + "\n")
    drawn = picture(figure, rows, compared(figure, results, extra))
    style.save(drawn, *(out / f"figure{figure}.{kind}" for kind in ("png", "svg")),
               width=24)
    return [out / f"{name}{figure}.{kind}" for name, kind in (
        ("figure", "csv"), ("figure", "png"), ("figure", "svg"), ("scores", "csv"),
        ("scores", "md"))]

if __name__ == "__main__":
    if not sys.argv[1:] or set(sys.argv[1:]) - set(GRIDS["figures"]):
        sys.exit(__doc__)
    for figure in sys.argv[1:]:
        for path in draw(figure):
            print(f"wrote {path}")
