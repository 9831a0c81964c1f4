"""What the README says was measured is what lies in results/."""
import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KRULL = ROOT / "results" / "krull"


def column(path, name):
    with open(path, newline="") as f:
        return [float(row[name]) for row in csv.DictReader(f)]


def table():
    """(arm, scores) of each row of the learning check's table."""
    for line in (ROOT / "README.md").read_text().splitlines():
        if found := re.search(r"learning_check.py train (\w+)` \|$", line):
            yield found[1], [int(x) for x in re.findall(r"\| \**(\d+)\** (?=\|)", line)]


@pytest.mark.parametrize("arm, scores", list(table()))
def test_scores_of_the_learning_check_are_the_committed_ones(arm, scores):
    evaluations = [KRULL / arm / f"seed{i + 1}" / "eval.csv" for i in range(len(scores))]
    assert scores == [round(column(path, "score_mean")[-1]) for path in evaluations]
    assert len(scores) == len(list(KRULL.glob(f"{arm}/seed*"))) >= 2
    assert all((path.parent / "args.json").exists() for path in evaluations)


def test_every_committed_arm_is_in_the_table():
    arms = {path.parent.parent.name for path in KRULL.glob("*/seed*/eval.csv")}
    assert {arm for arm, _ in table()} == arms and len(arms) >= 6


def test_gradients_of_the_committed_runs_are_as_far_apart_as_the_readme_says():
    """cosine >= 0.9988, gap 0.0004 to 0.05, error below 3.5e-6, on 180 batches."""
    runs = list(KRULL.glob("pgql_*/seed*/metrics.csv"))
    cosine, gap, error = ([x for path in runs for x in column(path, name)]
                          for name in ("cosine", "gap", "gap_error"))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "180 batches" in text and len(cosine) == 180
    assert "is 0.9988 or more" in text and min(cosine) >= 0.9988
    assert "0.0004 to 0.05 of" in text and 0.0004 < min(gap) < max(gap) < 0.05
    assert "less than 3.5e-6 of" in text and max(error) < 3.5e-6
