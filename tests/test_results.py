"""What the README says was measured is what lies in results/."""
import csv
import importlib.util
import re
import statistics
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


def test_what_was_tried_is_committed_with_its_scores():
    """The table of benchmarks/README.md."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    found = re.findall(r"\| ([\d, ]+|last \d+) \| `(\w[\w.]*)` \|$", text, re.M)
    assert len(found) >= 6
    for scores, folder in found:
        path = KRULL / "tried" / folder / "eval.csv"
        measured = [round(x) for x in column(path, "score_mean")]
        expected = [int(x) for x in re.findall(r"\d+", scores)]
        assert measured[-len(expected):] == expected and path.with_name("args.json").exists()


def test_evaluations_of_the_two_backups_vary_as_much_as_the_readme_says():
    text = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.search(r"from (\d+) to (\d+) with the hard backup and from (\d+) to (\d+) with the",
                       text)
    scores = [x for arm in ("hard", "entropy")
              for paths in [KRULL.glob(f"soft_dqn_{arm}/seed*/eval.csv")]
              for of in [[x for path in paths for x in column(path, "score_mean")]]
              for x in (min(of), max(of))]
    assert list(map(int, quoted.groups())) == list(map(round, scores))


def test_what_the_defaults_of_natural_pg_damped_rest_on_is_committed():
    """Scores, KL, residual and cosines of the table, by run."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    names = {"**default**": "base", "`--eps 3e-4`": "eps3e-4", "`--eps 3e-3`": "eps3e-3",
             "`--passes 2": "passes2v1", "`--value shared`": "shared", "`--value head`": "head"}
    lines = re.findall(r"^\| (.*) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d., ]+) \| ([\d., ]+) \|$",
                       text, re.M)
    assert len(lines) >= 5
    for about, score, kl, left, cosine, length in lines:
        folder, = (folder for name, folder in names.items() if about.startswith(name))
        path = KRULL / "tried" / f"natural_{folder}" / "metrics.csv"
        with open(path, newline="") as f:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]
        games = [row for row in rows if 20_000 < row["step"] < 41_500 and row["episodes"]]
        played = sum(row["episodes"] for row in games)
        mean = sum(row["episodes"] * row["score_mean"] for row in games) / played
        assert round(mean) == int(score)
        rows = [row for row in rows if 10_000 < row["step"] < 41_500]
        for name, value in (("kl_moved", kl), ("residual", left)):
            median = statistics.median(row[name] for row in rows)
            assert float(value) == pytest.approx(median, rel=0.05)
        measured = [row for row in rows if row["cosine"] == row["cosine"]]
        for name, values in (("cosine_fisher", cosine), ("norm_ratio", length)):
            assert [float(x) for x in values.split(", ")] == pytest.approx(
                [row[name] for row in measured], abs=0.06)


def test_steps_of_the_committed_runs_are_as_near_the_natural_gradient_as_the_readme_says():
    """Cosines and KL of 42 batches, and the scores at 100,000 steps beside those of a2c_proper."""
    runs = sorted(KRULL.glob("natural/seed*/metrics.csv"))
    values = {name: [x for path in runs for x in column(path, name) if x == x] for name in (
        "cosine", "cosine_fisher", "kl_measured", "kl_quadratic")}
    values["kl"] = [a / b for a, b in zip(values["kl_measured"], values["kl_quadratic"])]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "42 measured batches" in text and len(values["cosine"]) == 42
    for name, pattern in (("cosine_fisher", r"cosine of ([\d.]+) to ([\d.]+) with"),
                          ("cosine", r"in parameters ([\d.]+) to ([\d.]+),"),
                          ("kl", r"it moves is ([\d.]+) to ([\d.]+) of")):
        low, high = map(float, re.search(pattern, text).groups())
        assert round(min(values[name]), 2) == low and round(max(values[name]), 2) == high
    assert all(abs(x - 1) < 0.2 for x in values["kl"]), "within 20% of the prediction"
    quoted = re.search(r"(\d+), (\d+) and (\d+) after 100,000 steps, where that has "
                       r"(\d+), (\d+) and (\d+);", text).groups()
    found = [round(column(KRULL / arm / f"seed{seed}" / "eval.csv", "score_mean")[0])
             for arm in ("natural", "a2c_proper") for seed in (1, 2, 3)]
    assert list(map(int, quoted)) == found


def test_gap_table_of_the_equations_page_is_the_committed_one():
    rows = list(csv.DictReader(open(ROOT / "results" / "gap" / "gap.csv", newline="")))
    text = (ROOT / "EQUATIONS.md").read_text()
    for row in rows:
        x = {k: float(v) for k, v in row.items()}
        mdps = [x[f"mdp{i}_sample"] for i in range(5)]
        line = (f"| {x['tau']:.3f} | {min(mdps):.2g} to {max(mdps):.2g} | "
                f"{x['krull_sample']:.2g} | {x['krull_batch80']:.2g} |")
        assert line in text and x["mdp_expectation"] < 1e-15
    assert len(rows) == 7


def measured(name):
    """The rows of a throughput table, with numbers where there are some."""
    with open(ROOT / "results" / "throughput" / f"{name}.csv", newline="") as f:
        return [{k: v if k == "contestant" else float(v) for k, v in row.items()}
                for row in csv.DictReader(f)]


@pytest.mark.parametrize("name", ["a2c_cpu", "dqn_cpu", "scaling_cpu"])
def test_throughput_tables_are_those_of_the_committed_measurements(name):
    """Every line that the benchmark would print of them stands in benchmarks/README.md."""
    throughput = loaded("throughput")
    text = (ROOT / "benchmarks" / "README.md").read_text()
    rows = measured(name)
    for N in {row["num_envs"] for row in rows}:
        of_N = [row for row in rows if row["num_envs"] == N]
        for line in throughput.table(of_N, list(dict.fromkeys(row["contestant"] for row in of_N))):
            assert line in text, line


def test_speeds_that_the_readme_quotes_are_the_measured_ones():
    text = " ".join((ROOT / "README.md").read_text().split())
    for name, ours, peer in (("a2c_cpu", "a2c_proper", "sb3"), ("dqn_cpu", "soft_dqn", "sb3_dqn")):
        speed = {of: [row["steps_per_s"] for row in measured(name) if row["contestant"] == of]
                 for of in (ours, peer)}
        ratios = [a / b for a, b in zip(speed[ours], speed[peer])]
        median, least, most = (f(ratios) for f in (statistics.median, min, max))
        found = re.search(rf"`{ours}.py` (?:makes )?(\d+)[^`]*?, ([\d.]+) times [^`]*?"
                          r"\(([\d.]+) to ([\d.]+)", text).groups()
        assert int(found[0]) == round(statistics.median(speed[ours]))
        assert [float(x) for x in found[1:]] == [round(x, 2) for x in (median, least, most)]


def test_the_results_page_says_what_is_covered():
    """Of each figure the sentence that its table of scores begins with, and every folder."""
    text = (ROOT / "results" / "README.md").read_text()
    drawn = sorted((ROOT / "results" / "paper").glob("scores?.md"))
    for path in drawn:
        sentence = path.read_text().splitlines()[0]
        assert sentence.startswith("Of the ") and sentence in " ".join(text.split()), path.name
        assert f"(paper/figure{path.stem[-1]}.png)" in text and f"(paper/{path.name})" in text
    assert drawn
    for folder in (p for p in (ROOT / "results").iterdir() if p.is_dir()):
        assert f"({folder.name})" in text, folder.name


def loaded(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_the_soak_table_is_that_of_the_committed_samples():
    pytest.importorskip("psutil")
    text = (ROOT / "benchmarks" / "README.md").read_text()
    paths = sorted((ROOT / "results" / "soak").glob("*.csv"))
    assert {path.stem for path in paths} == {path.stem for path in ROOT.glob("*.py")}
    for line in loaded("soak").report(paths):
        assert line in text, line


def test_a_soak_report_tells_a_leak_from_noise(tmp_path):
    """60 MiB an hour, and a program that takes twice the work in its last third."""
    pytest.importorskip("psutil")
    lines = ["seconds,rss_mib,files,threads,cpu_s,step"]
    cpu, step = 0.0, 0
    for t in range(0, 1801, 10):
        lines.append(f"{t},{400 + t / 60 + t % 20 / 10},4,3,{cpu},{step}")
        cpu, step = cpu + 10, step + (2000 if t > 1200 else 4000)
    (tmp_path / "a.csv").write_text("\n".join(lines))
    row = list(loaded("soak").report([tmp_path / "a.csv"]))[-1].split(" | ")
    assert 58 < float(row[3]) < 62 and row[4:6] == ["4", "3"]
    assert float(row[6]) == pytest.approx(0.5, abs=0.02)
    assert float(row[7].split()[0]) == pytest.approx(2, abs=0.05)


def test_kills_that_the_readme_counts_are_in_the_committed_table():
    table = (ROOT / "results" / "kills" / "kill_loop.txt").read_text().splitlines()
    rows = [re.split(r"  +", line) for line in table if line.endswith("  ok")]
    assert len(rows) == len(table) - 3, "command, machine and header; all others are ok"
    kills, in_a_save = (sum(int(row[i]) for row in rows) for i in (1, 2))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"of {kills} kills, {in_a_save} of them while a save was being written" in text
