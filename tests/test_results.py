"""What the pages say was measured is what lies in results/."""
import csv
import importlib.util
import json
import re
import statistics
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import tyro

from util import ROOT

KRULL = ROOT / "results" / "krull"
sys.path.insert(0, str(ROOT / "benchmarks"))

def text(*pages):
    """The pages as one line."""
    return " ".join(" ".join((ROOT / page).read_text() for page in pages).split())

PAGES = text("README.md", "benchmarks/README.md", "results/README.md")

def table(path):
    """The rows of a CSV, with numbers where there are some."""
    with open(path, newline="") as f:
        return [{k: float(v) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", v) else v
                 for k, v in row.items()} for row in csv.DictReader(f)]

def column(path, name):
    return [x for x in (float(row[name]) for row in table(path)) if x == x]

def numbers(pattern):
    """The numbers that the pages have in the places of a pattern's groups."""
    return [float(x.replace(",", "")) for x in re.search(pattern, PAGES).groups()]

def loaded(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

# the learning check

def test_scores_of_the_learning_check_are_the_committed_ones():
    """Each row of the README's table, and no arm is missing."""
    found = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if arm := re.search(r"learning_check.py train (\w+)` \|$", line):
            _, _, scores, minutes, _ = line.split(" | ")
            found[arm[1]] = [int(x) for x in scores.split(", ")], int(minutes)
    folders = {path.parent for path in KRULL.glob("*/seed*")}
    assert set(found) == {folder.name for folder in folders} and len(found) >= 6
    for folder in folders:
        runs = sorted(folder.glob("seed*"))
        last = [round(column(run / "eval.csv", "score_mean")[-1]) for run in runs]
        seconds = [column(run / "eval.csv", "wall_time")[-1] for run in runs]
        assert found[folder.name] == (last, round(statistics.median(seconds) / 60))
        assert len(runs) == 3
        assert all((run / "args.json").exists() for run in runs)
    check, base = loaded("learning_check"), json.loads((KRULL / "baselines.json").read_text())
    bar = check.MARGIN * base["random"]
    below = [(*run.parts[-2:], round(score)) for run in sorted(KRULL.glob("*/seed*"))
             if (score := column(run / "eval.csv", "score_mean")[-1]) <= bar]
    asked, margin, seed, score = numbers(
        r"every seed scores above (\d+), which is ([\d.]+) times a random policy. All pass but "
        r"`--backup hard`: its seed (\d) scores (\d+)")
    assert (asked, margin) == (round(bar), check.MARGIN) and base["best_constant"] < bar
    assert below == [("soft_dqn_hard", f"seed{seed:.0f}", score)]
    assert "the difference is smaller than the spread between three seeds" in PAGES
    for pair in (("a2c_naive", "a2c_proper"), ("pgql_pg", "pgql_ql")):
        scores = [found[arm][0] for arm in pair]
        difference = abs(np.mean(scores[0]) - np.mean(scores[1]))
        assert difference < min(max(x) - min(x) for x in scores)
    assert f"ends below {margin} times a random policy" in PAGES

@pytest.mark.parametrize("cpu, name", [("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_the_quick_start_ended_as_the_readme_says(cpu, name):
    row, = table(ROOT / "results" / "quickstart" / cpu / "eval.csv")
    end = f"{row['score_mean']:.1f} +- {row['score_std']:.1f}"
    assert f"`score {end} in 20 games` with {name}" in text("README.md")
    assert f"{end} " in text("results/README.md") and (row["games"], row["step"]) == (20, 100_000)

def test_gradients_of_the_committed_runs_are_as_far_apart_as_the_pages_say():
    """Least cosine, the range and median of the gap, and the error of its closed form."""
    runs = list(KRULL.glob("pgql_*/seed*/metrics.csv"))
    cosine, gap, error = ([x for path in runs for x in column(path, name)]
                          for name in ("cosine", "gap", "gap_error"))
    batches, least, low, high, off = numbers(
        r"on (\d+) batches the cosine is ([\d.]+) or more. The gap is ([\d.]+) to ([\d.]+) of the "
        r"policy gradient's norm, and its closed form is off by less than ([\de.-]+) of")
    assert len(cosine) == batches and 0 <= min(cosine) - least < 1e-4
    assert [f"{x:.2g}" for x in (min(gap), max(gap))] == [f"{x:.2g}" for x in (low, high)]
    assert max(error) < off < 1.1 * max(error)
    bound, = numbers(r"On Krull the gap is at most ([\d.]+) ")
    assert max(gap) < bound < 1.1 * max(gap)
    quoted = f"it is {low:g} to {high:g}, with a median of {statistics.median(gap):.4f}."
    assert quoted in text("EQUATIONS.md")

def test_evaluations_of_the_two_backups_vary_as_much_as_the_pages_say():
    quoted = numbers(r"from (\d+) to (\d+) with the hard backup and from (\d+) to (\d+) with the")
    scores = []
    for arm in ("hard", "entropy"):
        paths = KRULL.glob(f"soft_dqn_{arm}/seed*/eval.csv")
        of = [x for path in paths for x in column(path, "score_mean")]
        scores += [min(of), max(of)]
    assert quoted == list(map(round, scores))
    runs = {arm: [(column(path, "score_mean")[-1], column(path, "score_std")[-1], path.parent)
                  for path in sorted(KRULL.glob(f"soft_dqn_{arm}/seed*/eval.csv"))]
            for arm in ("hard", "entropy")}
    for arm, pattern in (("entropy", r"tau = 0.01, scores (\d+), (\d+) and (\d+) and passes"),
                         ("hard", r"5e-4, scores (\d+), (\d+) and (\d+) and fails")):
        assert numbers(pattern) == [round(score) for score, *_ in runs[arm]]
    asked, below, mean, above = numbers(
        r"asks for (\d+) on .* Seed 3 is ([\d.]+) standard errors of its 20 games below .* last "
        r"100 games in training have a mean of (\d+). Seed 5 passes by ([\d.]+) standard errors")
    errors = [(score - asked) / std * 20 ** 0.5 for score, std, _ in runs["hard"]]
    assert [-below, above] == [round(errors[0], 1), round(errors[2], 1)]
    assert mean == round(column(runs["hard"][0][2] / "metrics.csv", "score")[-1])
    seed, *rest = numbers(r"soft-entropy, seed (\d), has (\d+), (\d+), (\d+) and (\d+), while the "
                          r"means over the last 100 games in training are (\d+) to (\d+) from step "
                          r"20,000 on")
    run = KRULL / "soft_dqn_entropy" / f"seed{seed:.0f}"
    means = [row["score"] for row in table(run / "metrics.csv") if row["step"] >= 20_000]
    assert rest == [round(x) for x in (*column(run / "eval.csv", "score_mean"), min(means),
                                       max(means))]

def test_steps_of_the_committed_runs_are_as_near_the_natural_gradient_as_the_pages_say():
    """Cosines and KL of 42 batches, and the scores at 100,000 steps beside those of a2c_proper."""
    runs = sorted(KRULL.glob("natural/seed*/metrics.csv"))
    values = {name: [x for path in runs for x in column(path, name)] for name in (
        "cosine", "cosine_fisher", "kl_measured", "kl_quadratic")}
    values["kl"] = [a / b for a, b in zip(values["kl_measured"], values["kl_quadratic"])]
    assert "42 measured batches" in PAGES and len(values["cosine"]) == 42
    for name, pattern in (("cosine_fisher", r"cosine of ([\d.]+) to ([\d.]+) with"),
                          ("cosine", r"in parameters ([\d.]+) to ([\d.]+),"),
                          ("kl", r"it moves is ([\d.]+) to ([\d.]+) of")):
        assert numbers(pattern) == [round(f(values[name]), 2) for f in (min, max)]
    quoted = numbers(r"(\d+), (\d+) and (\d+) after 100,000 steps, where `a2c_proper.py` has "
                     r"(\d+), (\d+) and (\d+);")
    assert quoted == [round(column(KRULL / arm / f"seed{seed}" / "eval.csv", "score_mean")[0])
                      for arm in ("natural", "a2c_proper") for seed in (1, 2, 3)]
    assert sum(quoted[:3]) > sum(quoted[3:]), "faster on average"

def test_what_was_tried_is_committed_with_its_scores():
    """Both tables of benchmarks/README.md."""
    tried = {row["try"]: row for row in table(KRULL / "tried.csv")}
    page = (ROOT / "benchmarks" / "README.md").read_text()
    found = re.findall(r"\| ([\d, ]+|last \d+) \| `(\w[\w.]*)` \|$", page, re.M)
    assert {name for _, name in found} == {name for name in tried if "natural" not in name}
    for scores, name in found:
        measured = re.findall(r": ([\d.]+)", tried[name]["evaluations"])
        expected = [int(x) for x in re.findall(r"\d+", scores)]
        assert [round(float(x)) for x in measured][-len(expected):] == expected
    found = re.findall(r"\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d., ]+) \| ([\d., ]+) "
                       r"\| `(natural_[\w-]+)` \|$", page, re.M)
    assert {name for *_, name in found} == {name for name in tried if "natural" in name}
    for score, kl, left, cosine, length, name in found:
        row = tried[name]
        assert int(score) == round(row["score_20k_to_41k"])
        assert float(kl) == pytest.approx(row["kl_moved"], rel=0.05)
        assert float(left) == pytest.approx(row["residual"], rel=0.05)
        for quoted, measured in ((cosine, "cosine_fisher"), (length, "norm_ratio")):
            measured = [float(x) for x in str(row[measured]).split("; ")]
            assert [float(x) for x in quoted.split(", ")] == pytest.approx(measured, abs=0.06)

def test_the_learning_check_knows_what_has_finished(tmp_path):
    check = loaded("learning_check")
    for rows, done in (("", False), ("100,4\n", False), ("100,4\n200,5\n", True)):
        (tmp_path / "eval.csv").write_text("step,score_mean\n" + rows)
        assert check.finished(tmp_path, 200) == done

# the other measurements

def test_gap_table_of_the_equations_page_is_the_committed_one():
    """And on MDPs, where it is an exact sum, that of today's functions."""
    page, tau = (ROOT / "EQUATIONS.md").read_text(), 0.01
    for x in table(ROOT / "results" / "gap" / "gap.csv"):
        mdps = [x[f"mdp{i}_sample"] for i in range(5)]
        line = (f"| {x['tau']:.3f} | {min(mdps):.2g} to {max(mdps):.2g} | "
                f"{x['krull_sample']:.2g} | {x['krull_batch80']:.2g} |")
        assert line in page and x["mdp_expectation"] < 1e-15
        if x["tau"] == tau:
            import torch
            torch.set_default_dtype(torch.float64)
            try:
                gap = loaded("gradient_gap")
                assert [gap.on_mdp(tau, seed)[0] for seed in range(5)] == pytest.approx(mdps, 1e-5)
            finally:
                torch.set_default_dtype(torch.float32)

def test_throughput_tables_are_those_of_the_committed_measurements():
    page, throughput = (ROOT / "benchmarks" / "README.md").read_text(), loaded("throughput")
    rows = {path.stem: table(path) for path in (ROOT / "results" / "throughput").glob("*.csv")}
    for beside, of in (("nothing", "{:.0f}, {:.0f}\nand {:.0f}"), ("two", "{:.0f} and {:.0f}")):
        for policy in ("spin", "PASSIVE"):
            speeds = [row["steps_per_s"] for row in rows["wait_policy"]
                      if row["policy"] == policy and row["beside"].startswith(beside)]
            assert " ".join(of.format(*speeds).split()) in " ".join(page.split())
    for name in ("a2c_cpu", "dqn_cpu"):
        names = list(dict.fromkeys(row["contestant"] for row in rows[name]))
        for line in throughput.table(rows[name], names):
            assert line in page, line
    for N in (8, 16, 32, 64, 128):
        speeds = [throughput.spread([row["steps_per_s"] for row in rows["scaling_cpu"] if (
            row["num_envs"], row["contestant"]) == (N, of)], ".0f")
            for of in ("emulator", "a2c_proper")]
        assert f"| {N} | {' | '.join(speeds)} |" in page

@pytest.mark.parametrize("name, ours, peer", [("a2c_cpu", "a2c_proper", "sb3"),
                                              ("dqn_cpu", "soft_dqn", "sb3_dqn")])
def test_speeds_that_the_pages_quote_are_the_measured_ones(name, ours, peer):
    rows = table(ROOT / "results" / "throughput" / f"{name}.csv")
    speed = {of: [row["steps_per_s"] for row in rows if row["contestant"] == of]
             for of in (ours, peer)}
    ratios = [a / b for a, b in zip(speed[ours], speed[peer])]
    expected = [round(statistics.median(speed[ours]))]
    expected += [round(f(ratios), 2) for f in (statistics.median, min, max)]
    assert numbers(rf"`{ours}.py` (?:makes |made )?(\d+)[^`]*?, ([\d.]+) times [^`]*?"
                   r"\(([\d.]+) to ([\d.]+)") == expected

def test_the_results_page_says_what_is_covered():
    """Of each figure the sentence that its table of scores begins with, and every folder."""
    page = text("results/README.md")
    drawn = sorted((ROOT / "results" / "paper").glob("scores?.md"))
    for path in drawn:
        sentence = path.read_text().splitlines()[0]
        assert sentence.startswith("Of the ") and sentence in page, path.name
        assert f"(paper/figure{path.stem[-1]}.png)" in page and f"(paper/{path.name})" in page
    assert drawn
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        assert f"({folder.name})" in page, folder.name

PONG = ROOT / "results" / "paper"

def pong(arm, name, frames="40M"):
    return table(PONG / f"{arm}_tau_0.01" / "Pong" / frames / "seed1" / f"{name}.csv")

def test_scores_and_hours_on_pong_are_the_committed_ones():
    """In the README's table and wherever else the pages say them; the agents are those runs'."""
    found = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if row := re.search(r"^\| `(\w+).py( --update ql)?` \| ([\d.]+) million \| (\S+) \| (\S+) "
                            r"\| `python (\w+.py)(.*)` \|$", line):
            script, update, *values, same, flags = row.groups()
            assert same == f"{script}.py" and (update or "") in flags
            found[script] = float(values[1])
            frames = f"{4 * float(values[0]):.0f}M"
            run = PONG / (script + "_update_ql" * bool(update) + "_tau_0.01") / "Pong" / frames
            last = table(run / "seed1" / "eval.csv")[-1]
            assert last["games"] == 20 and 0 <= last["step"] - 1e6 * float(values[0]) < 512
            assert float(values[1]) == round(last["score_mean"], 1)
            assert float(values[2]) == round(last["wall_time"] / 3600, 1)
            args = tyro.cli(importlib.import_module(script).Args, args=flags.split())
            trained = json.loads((run / "seed1" / "args.json").read_text())["args"]
            other = {k: trained[k] for k in ("device", "eval_every", "runs_dir")}
            assert vars(args) | other == trained
    assert list(found) == ["a2c_naive", "a2c_proper", "pgql_equiv", "natural_pg_damped"]
    for script in ("a2c_naive", "a2c_proper"):
        last = pong(script, "eval")[-1]
        module = importlib.import_module(script)
        agent = torch.load(ROOT / "results" / "agents" / script / module.CHECKPOINT,
                           weights_only=True)
        assert agent["counts"]["step"] == last["step"]
        assert agent["counts"]["wall"] == pytest.approx(last["wall_time"])
        trained = PONG / f"{script}_tau_0.01" / "Pong" / "40M" / "seed1" / "args.json"
        assert agent["args"] | dict(resume="") == json.loads(trained.read_text())["args"]
        assert np.mean(agent["counts"]["scores"]) == pytest.approx(
            pong(script, "metrics")[-1]["score"])
    grids = json.loads((ROOT / "paper" / "grids.json").read_text())
    others = [grids["random"]["scores"]["Pong"], *sorted(
        of["scores"]["Pong"] for of in grids["published"]["A2C"])]
    assert numbers(r"random policy scores (-[\d.]+), published A2C ([\d.]+) and ([\d.]+) after 10"
                   ) == others == numbers(
        r"random policy (-[\d.]+), published A2C ([\d.]+) and ([\d.]+)\. So")
    naive, proper, ql, natural = found.values()
    assert numbers(r"`a2c_naive.py` scores ([\d.]+), `pgql_equiv.py --update ql` ([\d.]+) and "
                   r"`a2c_proper.py` ([\d.]+); published A2C scores 17 to 20\. "
                   r"`natural_pg_damped.py` scores ([\d.]+) after 10 million frames\.") == [
        naive, ql, proper, natural]
    assert numbers(r"`a2c_naive.py` scores ([\d.]+) at the end, `a2c_proper.py` ([\d.]+),") == [
        naive, proper]
    assert numbers(r"--update ql`\) scores ([\d.]+) and the policy gradient ([\d.]+)\.") == [
        ql, proper]

def test_evaluations_on_pong_differ_as_much_as_the_results_page_says():
    naive, proper, ql = (pong(arm, "eval") for arm in (
        "a2c_naive", "a2c_proper", "pgql_equiv_update_ql"))
    assert numbers(r"at 20M frames `a2c_proper.py` scored ([\d.]+), in games from (-\d+) to (\d+)\."
                   ) == [proper[4][f"score_{of}"] for of in ("mean", "min", "max")]
    lost = table(PONG / "a2c_naive_tau_0.01/Pong/40M/seed1/eval_lost_run.csv")
    assert [row["score_mean"] for row in lost[:6]] == [row["score_mean"] for row in naive[:6]]
    assert numbers(r"After 7, 8 and 9 million agent steps it scored (-[\d.]+), ([\d.]+) and "
                   r"([\d.]+)\. The later run, whose curve this is, scores ([\d.]+), ([\d.]+) and "
                   r"([\d.]+)\."
                   ) == [round(row["score_mean"], 1) for of in (lost, naive) for row in of[6:9]]
    chance = max(abs(a["score_mean"] - b["score_mean"]) for a, b in zip(lost, naive))
    assert numbers(r"of one method can be ([\d.]+) points apart by chance") == [round(chance, 1)]
    scores = naive, proper, ql = [[row["score_mean"] for row in of] for of in (naive, proper, ql)]
    assert all(a > b for a, b in zip(proper[:5], naive))  # it rose first and ended lower
    assert all(a < b for a, b in zip(proper[6:], naive[6:]))
    apart = [max(abs(a - b) for a, b in zip(of, proper)) for of in (ql, naive)]
    quoted = numbers(r"the two are at most ([\d.]+) points apart, less than") + numbers(
        r"is at most ([\d.]+) points from")
    assert quoted == pytest.approx(apart, abs=0.051) and apart[0] < chance
    for of in scores:  # they rise until 20M frames, fall until 24M and rise again
        assert of[:5] == sorted(of[:5]) and of[5] < of[4] and of[9] > of[4]

def test_the_two_gradients_on_pong_are_as_far_apart_as_the_pages_say():
    log = pong("pgql_equiv_update_ql", "metrics")
    cosine, gap, error = ([row[of] for row in log] for of in ("cosine", "gap", "gap_error"))
    assert [row["step"] for row in log] == [1e4 * (1 + i) for i in range(1000)]
    found = re.findall(
        r"on ([\d,]+) batches.{,130}The cosine of the two (?:gradients )?is ([\d.]+) or more, "
        r"with a median of ([\d.]+)\. The gap[^.]* is ([\d.]+) to ([\d.]+) of the policy "
        r"gradient's norm, with a median of ([\d.]+)\..{,99}closed form is off by less than "
        r"([\d.]+)e-6 of", PAGES)
    assert len(found) == 2 and found[0] == found[1], "README and results"
    count, least, *others, bound = [float(x.replace(",", "")) for x in found[0]]
    assert count == len(log) and min(cosine) - 1e-3 < least <= min(cosine)
    assert others == [round(statistics.median(cosine), 4), round(min(gap), 4), round(max(gap), 2),
                      round(statistics.median(gap), 3)]
    assert max(error) < bound * 1e-6 < max(error) + 1e-7
    parts = gap[:100], gap[500:600], gap[-100:]
    assert numbers(r"Over the first 4M frames the median of the gap is ([\d.]+)\. It grows to "
                   r"([\d.]+) over the 4M frames before 24M, [^.]*: it is ([\d.]+) over the last 4M"
                   ) == [round(statistics.median(of), 3) for of in parts]

def test_section_5_on_pong_is_as_fast_as_the_results_page_says():
    """Per agent step and per hour, between evaluations on a line, and the measured steps."""
    natural = pong("natural_pg_damped", "eval", "10M")
    peers = naive, proper = [pong(arm, "eval") for arm in ("a2c_naive", "a2c_proper")]
    def hours(of):
        return [row["wall_time"] / 3600 for row in of]
    def score(of):
        return [row["score_mean"] for row in of]
    assert numbers(r"`natural_pg_damped.py` scores ([\d.]+) after 10M frames, its whole schedule\. "
                   r"That took ([\d.]+) hours") == [
        round(score(natural)[-1], 1), round(hours(natural)[-1], 1)]
    assert numbers(r"it scored ([\d.]+) \(later ([\d.]+) and ([\d.]+)\), `a2c_naive.py` (-[\d.]+) "
                   r"and `a2c_proper.py` (-[\d.]+)\.") == [
        round(x, 1) for x in (*score(natural)[7:], *(score(of)[1] for of in peers))]
    since, until, end = numbers(r"ahead of both from ([\d.]+) hours until ([\d.]+) hours, [^.]*\. "
                                r"Then `a2c_naive.py` catches up and ends at ([\d.]+)\.")
    assert (since, end) == (round(hours(natural)[1], 1), round(score(naive)[-1], 1))
    def ahead(of, time):
        return np.interp(time, hours(natural), score(natural)) > np.interp(
            time, hours(of), score(of))
    assert all(ahead(of, time) for of in peers for time in np.arange(since, until - 0.05, 0.01))
    assert not ahead(naive, until + 0.05) and score(proper)[-1] < score(natural)[-1] < end
    steps = [row for row in pong("natural_pg_damped", "metrics", "10M")
             if isinstance(row["cosine_fisher"], float)]
    fisher, plain = ([row[of] for row in steps] for of in ("cosine_fisher", "cosine"))
    assert numbers(r"regression's step and this one is between ([\d.]+) and ([\d.]+) in the "
                   r"metric of F_all[^.]*, with a median of ([\d.]+), and between ([\d.]+) and "
                   r"([\d.]+) in parameters\.") == [
        round(x, 2) for x in (min(fisher), max(fisher), statistics.median(fisher), min(plain),
                              max(plain))]
    args = json.loads((PONG / "natural_pg_damped_tau_0.01" / "Pong" / "10M" / "seed1" /
                       "args.json").read_text())["args"]
    assert (args["damping"], args["cg_iterations"], args["passes"], args["value_passes"],
            args["n_step"]) == (0.1, 10, 4, 2, 16)
    residual = [row["residual"] for row in pong("natural_pg_damped", "metrics", "10M")]
    length = [row["norm_ratio"] for row in steps]
    assert numbers(r"found on (\d+) batches, with damping 0.1 and ten iterations") == [len(steps)]
    assert numbers(r"step is ([\d.]+) times as long in the median\. The fit leaves (\d+)% of") == [
        round(statistics.median(length), 1), round(100 * statistics.median(residual))]

def dqn(figure, arm):
    """Evaluations, metrics and flags of a DQN on Pong."""
    run, = (PONG / f"figure{figure}_soft_dqn_backup_{arm}" / "Pong").glob("*/seed1")
    tables = (table(run / f"{name}.csv") for name in ("eval", "metrics"))
    return *tables, json.loads((run / "args.json").read_text())["args"]

def test_the_three_backups_on_pong_learn_as_the_results_page_says():
    """The table has every evaluation; the values of soft-entropy are those of the entropy."""
    evals, logs, args = zip(*(dqn(5, arm) for arm in (
        "hard", "soft-kl_tau_0.1", "soft-entropy_tau_0.1")))
    section = text("results/README.md").split("### Figure 2")[1].split("###")[0]
    rows = re.findall(r"\| ([\d,]+) \| (-?[\d.]+) \| (-?[\d.]+) \| (-?[\d.]+) \|", section)
    assert [[float(x.replace(",", "")) for x in row] for row in rows] == [
        [row[0]["step"], *(round(of["score_mean"], 1) for of in row)]
        for row in zip(*evals, strict=True)]
    ends = [of[-1] for of in evals]
    steps, hours = numbers(r"The first ([\d,]+) steps have been made, [^.]*, in ([\d.]+) hours")
    assert {(end["step"], round(end["wall_time"] / 3600, 1)) for end in ends} == {(steps, hours)}
    assert 4 * steps == 1e6, "the README's million frames"
    assert numbers(r"first million frames `--backup hard` scores (-?[\d.]+), `--backup soft-kl` "
                   r"(-?[\d.]+) and `--backup soft-entropy` (-?[\d.]+) \(") == [
        round(end["score_mean"], 1) for end in ends]
    assert numbers(r"games of hard's last evaluation end between (-?\d+) and (-?\d+), those of "
                   r"soft-kl between (-?\d+) and (-?\d+), those of soft-entropy between (-?\d+) "
                   r"and (-?\d+)\.") == [
        end[f"score_{of}"] for end in ends for of in ("min", "max")]
    tau, gamma, copies = (args[2][x] for x in ("tau", "gamma", "target_network_frequency"))
    constant, closed, made, left, *now = numbers(
        r"tau ln 6 / \(1 - gamma\) = ([\d.]+) to .* close about (\d)% of [^.]*, so (\d+) copies "
        r"leave (\d)% of it\. .* soft maximum is ([\d.]+) on average, and it is still rising\. "
        r"The hard maximum is (-?[\d.]+), the soft maximum of soft-kl (-?[\d.]+)\.")
    assert [constant, closed] == [round(tau * np.log(6) / (1 - gamma), 1), round(100 - 100 * gamma)]
    assert [of[-1]["updates"] for of in logs] == [steps - args[0]["learning_starts"]] * 3
    assert [made, left] == [logs[2][-1]["updates"] / copies, round(100 * gamma ** made)]
    assert now == [round(logs[i][-1][x], 1) for i, x in ((2, "V_Q"), (0, "max_Q"), (1, "V_Q"))]
    assert all(a["V_Q"] < b["V_Q"] for a, b in pairwise(logs[2][1:]))
    hard, kl, ent = ({e["step"]: e["score_mean"] for e in of} for of in evals)
    assert all(kl[step] > ent[step] for step in kl), "at each evaluation"
    behind, = numbers(r"soft-kl falls behind hard after ([\d,]+) steps")
    assert kl[behind] > hard[behind] and all(kl[x] < hard[x] for x in kl if x > behind)
    fast = dqn(6, "hard")[2]
    assert args[0]["n_step"] == 1 and 2 * args[0]["learning_rate"] == fast["learning_rate"]
    for other in args[1:]:
        assert {k for k in args[0] if args[0][k] != other[k]} == {"backup", "runs_dir"}

def test_the_dqn_for_a_cpu_scores_as_the_pages_say():
    """One run to its end, by the README's command."""
    evals, logs, trained = dqn(6, "hard")
    end = evals[-1]
    assert trained["total_timesteps"] == end["step"] == logs[-1]["step"] and end["games"] == 20
    score, hours = round(end["score_mean"], 1), round(end["wall_time"] / 3600, 1)
    assert numbers(r"\| `soft_dqn.py --backup hard` \| ([\d.]+) million \| (-?[\d.]+) \| ([\d.]+) "
                   r"\| the command below") == [end["step"] / 1e6, score, hours]
    assert numbers(r"with three-step targets scores (-?[\d.]+) after one million") == [score]
    assert numbers(r"2e-4 scores (-?[\d.]+) after ([\d,]+) steps, [^.]*\. That is a million "
                   r"frames, and took ([\d.]+) hours") == [
        score, end["step"], hours]
    others = re.findall(r"million \| (-?[\d.]+) \| ([\d.]+) \| `", text("README.md"))
    assert len(others) == 4 and all(score > float(x) and hours < float(y) for x, y in others), (
        "least time and most points")
    curve = re.search(r"one every ([\d,]+) steps, are (-[^a-z]*)\. The", PAGES)
    assert [float(x) for x in curve[2].split(", ")] == [round(x["score_mean"], 1) for x in evals]
    published = json.loads((ROOT / "paper" / "grids.json").read_text())["published"]["DQN"]
    for words in ("and published DQN", "Published DQN scores"):
        assert numbers(words + r" ([\d.]+) and ([\d.]+)") == [of["scores"]["Pong"]
                                                             for of in published]
    readme = (ROOT / "README.md").read_text()
    flags, = re.findall(r"^python soft_dqn.py (--backup hard .*)$", readme, re.MULTILINE)
    args = tyro.cli(importlib.import_module("soft_dqn").Args, args=flags.split())
    assert vars(args) | {k: trained[k] for k in ("device", "runs_dir")} == trained
    assert f"{trained['eval_every']:,}" == curve[1]
    agent = torch.load(ROOT / "results" / "agents" / "soft_dqn" / "soft_dqn.pt", weights_only=True)
    assert agent["args"] | dict(resume="") == trained
    assert agent["counts"]["step"] == end["step"]
    assert agent["counts"]["wall"] == pytest.approx(end["wall_time"])
    assert np.mean(agent["counts"]["scores"]) == pytest.approx(logs[-1]["score"])

@pytest.mark.parametrize("name, least", [("a2c_naive", 5), ("soft_dqn", 15)])
def test_a_committed_agent_wins_at_pong(name, least, capsys):
    """It has no state of an optimizer; --evaluate does without. The runs' worst games: 10, 17."""
    agent = ROOT / "results" / "agents" / name
    script = importlib.import_module(name)
    before = {path: path.stat().st_mtime for path in agent.iterdir()}
    script.train(script.Args(evaluate=str(agent), env_id="ALE/Pong-v5", eval_games=2, threads=1,
                             device="cpu"))
    score, games = re.search(r"score (\S+) \+- \S+ in (\d+) games",
                             capsys.readouterr().out).groups()
    assert float(score) >= least and games == "2"
    assert {path: path.stat().st_mtime for path in agent.iterdir()} == before

RUNS = [*sorted((ROOT / "results" / "paper").glob("*/*/*/seed*")),
        *sorted(KRULL.glob("*/seed*"))]

@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(run.parts[-4:]))
def test_a_committed_run_was_resumed_and_has_every_row_once(run):
    """By the same code and flags; rows are at the first step in each --log-every, --eval-every."""
    parts = [json.loads(path.read_text()) for path in run.glob("args*.json")]
    first, *resumed = sorted(parts, key=lambda part: "--resume" in part["command"])
    assert resumed and all("--resume" in part["command"] for part in resumed)
    assert "--resume" not in first["command"]
    for part in parts:
        assert part["commit"] == first["commit"] and "dirty" not in part["commit"]
        assert part["args"] | dict(resume="") == first["args"]
    for log, every in (("metrics.csv", "log_every"), ("eval.csv", "eval_every")):
        steps = column(run / log, "step")
        assert [step // first["args"][every] for step in steps] == [*range(1, len(steps) + 1)]

def test_stable_baselines3_learns_as_late_as_the_results_page_says():
    quoted = numbers(r"after (\d+)M frames the mean of its last 100 games in training is "
                     r"(-?[\d.]+), that of `a2c_naive.py` (-?[\d.]+)")
    curve = table(ROOT / "results" / "sb3_pong" / "curve.csv")
    naive = table(ROOT / "results/paper/a2c_naive_tau_0.01/Pong/40M/seed1/metrics.csv")
    assert [row["step"] for row in curve] == sorted({row["step"] for row in curve})
    assert curve[-1]["games"] == 100
    ours = next(row for row in naive if row["step"] == 3e6)
    assert quoted == [round(4 * curve[-1]["step"] / 1e6), round(curve[-1]["score"], 1),
                      round(ours["score"], 1)]
