"""paper/figures.py: the grids, the runner on both engines, what it draws, and what is committed."""
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from util import ROOT, rows

sys.path.insert(0, str(ROOT / "paper"))
import figures
import plots

TINY = ["--num-envs", "2", "--max-episode-frames", "200", "--eval-games", "2", "--eval-every",
        "100", "--log-every", "100", "--save-every", "100"]

def args(figure="1", tmp_path=Path("nowhere"), **flags):
    return figures.Args(figure, runs_dir=str(tmp_path / "runs"), device="cpu",
                        results_dir=str(tmp_path / "results"), **flags)

def called(monkeypatch, tmp_path, figure, *flags, extra=TINY):
    """The command line in this process, on one game and seed; returns its exit code."""
    line = [figure, "--games", "breakout", "--seeds", "1", "--device", "cpu", "--threads", "1",
            "--jobs", "2", "--runs-dir", str(tmp_path / "runs"), "--results-dir",
            str(tmp_path / "results"), *flags, "--", *extra]
    monkeypatch.setattr(sys, "argv", ["figures.py", *line])
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit) as stop:
        figures.main()
    for number, handler in zip(numbers, before):  # main() sets its own
        signal.signal(number, handler)
    return int(stop.value.code)

# the grids

def test_the_grids_are_the_papers_and_a_cell_is_a_line_of_the_dry_run(tmp_path, capsys):
    counts = {"1": 2 * 6 * 3, "2": 6 * 6 * 2, "3": 2 * 6 * 3, "4": 3 * 6 * 3, "5": 4, "6": 3}
    frames = {"1": 320, "2": 40, "3": 320, "4": 40, "5": 2.4, "6": 1}  # millions
    for figure, count in counts.items():
        cells = figures.cells(args(figure))
        assert len(cells) == count == len({cell.place for cell in cells})
        assert {4 * cell.steps for cell in cells} == {1e6 * frames[figure]}
        assert max(len(str(cell.place)) for cell in cells) < 90, "Windows allows 260 in a path"
    first = figures.cells(args("1"))[0]
    flags = dict(zip(first.flags[::2], first.flags[1::2]))
    assert first.steps == 80_000_000 and flags["--total-timesteps"] == "80000000"
    assert (flags["--schedule-timesteps"], flags["--eval-every"]) == ("80000000", "1000000")
    figures.figure(args("2", tmp_path, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 72 and "--seed 2" in lines[49] and "ALE/Enduro-v5" in lines[49]
    figures.figure(args("2", tmp_path, dry_run=True, cell=50))
    assert capsys.readouterr().out.splitlines() == [lines[49]]
    assert not list(tmp_path.iterdir())

def test_every_flag_of_the_grids_is_one_of_its_script():
    import tyro
    for figure in figures.GRIDS["figures"]:
        for cell in figures.cells(args(figure)):
            Args = importlib.import_module(cell.script[:-3]).Args
            read = vars(tyro.cli(Args, args=[*cell.flags, "--device", "cpu"]))
            for flag, value in pairwise((*cell.flags, "--")):
                if flag.startswith("--"):
                    expected = "True" if value.startswith("--") else value
                    assert str(read[flag[2:].replace("-", "_")]) == expected

def test_part_of_a_grid_keeps_the_horizon():
    cells = figures.cells(args("1", games=("pong", "QBERT"), seeds=1, frames="10M", arms=("A2C",)))
    assert [(cell.game, cell.steps) for cell in cells] == [("Pong", 2_500_000),
                                                         ("Qbert", 2_500_000)]
    line = figures.command_of(cells[0], 3, "cpu")
    flags = dict(zip(line[1::2], line[2::2]))
    assert line[0] == "a2c_naive.py" and flags["--tau"] == "0.01"
    assert flags["--total-timesteps"] == "2500000" and flags["--env-id"] == "ALE/Pong-v5"
    assert flags["--schedule-timesteps"] == "80000000" and flags["--threads"] == "3"
    short, = figures.cells(args("1", games=("pong",), seeds=1, frames="1M", horizon="40M",
                                arms=("EntRL",)))
    also, = figures.cells(args("4", games=("pong",), seeds=1, arms=("EntRL",)))
    assert short.place == also.place, "the same run serves two figures"
    assert short.place != figures.cells(args("1", games=("pong",), arms=("EntRL",)))[0].place
    same = dict(games=("pong",), seeds=1, arms=("standard",), horizon="2.4M", frames="2.4M")
    one, other = (figures.cells(args(figure, **same))[0] for figure in "25")
    assert one.place != other.place, "the flags of all arms of Figure 5 tell them apart"

@pytest.mark.parametrize("flags, text", [
    (dict(games=("Pacman",)), "--games Pacman: the figure has BeamRider"),
    (dict(arms=("soft",)), "--arms soft: the figure has A2C, EntRL"),
    (dict(frames="ten"), "ten is no number of frames"), (dict(frames="nan"), "nan is no number"),
    (dict(frames="1.5"), "1.5 is no number"), (dict(frames="400M"), "more than --horizon 320M"),
    (dict(seeds=-1), "--seeds -1"), (dict(cell=37), "--cell 37: there are 36")])
def test_bad_input_is_refused(flags, text):
    with pytest.raises(ValueError, match=text):
        figures.cells(args("1", **flags))

def test_numbers_of_frames():
    assert [figures.number(x) for x in ("2500000", "2.5M", "300k", "0.32B", "40m")] == [
        2_500_000, 2_500_000, 300_000, 320_000_000, 40_000_000]
    assert [figures.exact(x) for x in (40_000_000, 9_984_000, 79_361)] == ["40M", "9984k", "79361"]

def test_a_closed_pipe_is_no_error():
    line = [sys.executable, str(ROOT / "paper/figures.py"), "1", "--dry-run"]
    done = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done.stdout.close()
    assert done.stderr.read() == "" and done.wait() == 1

# the runner, with small programs in place of the scripts

LEARNER = """
import argparse, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
for flag in ("env-id seed total-timesteps schedule-timesteps eval-every threads device runs-dir "
             "resume step-seconds eval-seconds").split():
    parser.add_argument("--" + flag, default="0")
args, stop = parser.parse_args(), []
def on_signal(n, _):  # as the scripts: a second one of a kind kills
    stop.append(128 + n)
    signal.signal(n, signal.SIG_DFL)
for n in (signal.SIGINT, signal.SIGTERM):
    signal.signal(n, on_signal)
folder, total = pathlib.Path(args.runs_dir, "run"), int(args.total_timesteps)
folder.mkdir(parents=True, exist_ok=args.resume != "0")
with open(folder.parent / "pids", "a") as f:
    f.write(f"{os.getpid()}\\n")
at = int((folder / "learner.pt").read_text()) if args.resume != "0" else 0
(folder / "eval.csv").write_text("step,wall_time,score_mean\\n")
rows = [f"{k},500\\n" for k in range(100, at + 1, 100)]  # those after the checkpoint go
(folder / "metrics.csv").write_text("".join(["step,sps\\n", *rows]))
def save():
    (folder / "new").write_text(str(at))
    (folder / "new").replace(folder / "learner.pt")
while at < total and not stop:
    time.sleep(float(args.step_seconds))
    at += 100
    with open(folder / "metrics.csv", "a") as f:
        f.write(f"{at},500\\n")
    if at % 200 == 0 and at < total:
        save()
for _ in range(100):
    time.sleep(0 if stop else float(args.eval_seconds) / 100)
if not stop:
    (folder / "eval.csv").write_text(f"step,wall_time,score_mean\\n{at},60,7.5\\n")
save()
sys.exit(stop[0] if stop else 0)
"""

@pytest.fixture
def learner(tmp_path, monkeypatch):
    """Figure 1 with one arm, a program that takes the flags of the scripts, and its two seeds."""
    (tmp_path / "learner.py").write_text(LEARNER)
    grid = dict(figures.GRIDS["figures"]["1"], arms={"A2C": [str(tmp_path / "learner.py")]})
    monkeypatch.setitem(figures.GRIDS["figures"], "1", grid)
    monkeypatch.chdir(tmp_path)

    def runner(*flags, extra=()):
        """The command line in a process of its own."""
        code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import figures; "
                f"figures.GRIDS['figures']['1'] = {grid!r}; figures.main()")
        line = ["1", "--games", "breakout", "--frames", "4000", "--device", "cpu", "--runs-dir",
                str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results"), *flags]
        return subprocess.Popen([sys.executable, "-c", code, str(ROOT / "paper"), *line, "--",
                                 *extra], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return runner

def wait_for(found, process=None):
    """Waits until a function returns something, and returns it."""
    until = time.monotonic() + 60
    while time.monotonic() < until and (process is None or process.poll() is None):
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(process and process.communicate())

def pids(tmp_path):
    return [int(pid) for path in sorted(tmp_path.glob("runs/*/*/*/seed*/pids"))
            for pid in path.read_text().split()]

def steps(tmp_path, seed=1, log="metrics.csv"):
    return [int(row["step"]) for path in tmp_path.glob(f"runs/*/*/*/seed{seed}/run/{log}")
            for row in rows(path.parent, log)]

EVERY = list(range(100, 1001, 100))

def test_what_was_cut_off_goes_on_with_the_same_command(tmp_path, learner):
    """Killed are a run, then the runner in the last evaluation, which leaves no run behind."""
    slow, flags = ["--step-seconds", "0.1", "--eval-seconds", "2"], ["--seeds", "1"]
    first = learner(*flags, extra=slow)
    wait_for(lambda: len(steps(tmp_path)) > 3, first)
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    out, err = first.communicate()
    assert first.returncode == 1 and "done 0 of 1, failed 0" in out.splitlines()[-1], out + err
    runner = learner(*flags, extra=slow)
    wait_for(lambda: len(steps(tmp_path)) == 10, runner)
    runner.kill()
    runner.communicate()
    status = learner(*flags, "--status", extra=slow).communicate()[0].splitlines()
    assert "done 0" in status[-1] and "4k of 4k" in status[0]
    last = learner(*flags, extra=slow)  # waits for the run that still saves, or takes over
    out, err = last.communicate()
    assert last.returncode == 0 and "done 1" in out, out + err
    assert steps(tmp_path) == EVERY and steps(tmp_path, log="eval.csv") == [1000]
    count = len(pids(tmp_path))
    assert learner(*flags, extra=slow).wait() == 0 and len(pids(tmp_path)) == count, "run again"
    for pid in pids(tmp_path):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_runner_saves_the_runs(tmp_path, learner, number):
    """Also where a job scheduler has sent the run the same signal; two of it would kill a run."""
    runner = learner("--seeds", "2", "--jobs", "2", extra=["--step-seconds", "0.5"])
    wait_for(lambda: steps(tmp_path) and steps(tmp_path, 2), runner)
    for pid in pids(tmp_path) if number == signal.SIGTERM else ():
        os.kill(pid, number)
    runner.send_signal(number)
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 128 + number, out + err
    assert "done 0 of 2, failed 0" in out.splitlines()[-1], out + err
    for seed in (1, 2):
        saved, = tmp_path.glob(f"runs/*/*/*/seed{seed}/run/learner.pt")
        assert int(saved.read_text()) == steps(tmp_path, seed)[-1] < 1000, "not saved"

def test_a_folder_in_use_is_not_trained_in_twice(tmp_path, learner, monkeypatch, capsys):
    monkeypatch.setattr(figures, "ORPHAN_SECONDS", 0.1)
    runner = learner("--seeds", "1", extra=["--step-seconds", "0.2"])
    wait_for(lambda: steps(tmp_path), runner)
    code = called(monkeypatch, tmp_path, "1", "--frames", "4000",
                  extra=["--step-seconds", "0.2"])
    assert code == 1 and "failed: another process is training" in capsys.readouterr().out
    runner.terminate()
    runner.communicate()

def test_a_failed_and_a_killed_run_are_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """And no more run at once than --jobs says."""
    grid = figures.cells(args("2", tmp_path, seeds=1))[:5]
    good = "time.sleep(1.5); d.joinpath('run').mkdir(exist_ok=True); " \
           "d.joinpath('run/eval.csv').write_text('step\\n10000000\\n')"
    body = dict(zip(grid, ["print('starting'); raise SystemExit('error: no luck')",
                           "os.kill(os.getpid(), 9)", good, "pass", good]))
    monkeypatch.setattr(figures, "command_of", lambda cell, *_: [
        "-c", f"import os, pathlib, time; d = pathlib.Path({str(cell.folder)!r}); {body[cell]}"])
    engine, seen, states = figures.Local(args("2", jobs=2)), [], dict.fromkeys(grid, "left")
    ended = engine.ended
    engine.ended = lambda running: seen.append(len(running)) or ended(running)
    figures.run(engine, grid, states)
    assert list(states.values()) == ["failed: error: no luck", "cut off", "done",
                                     "failed: exit code 0", "done"]
    assert max(seen) == 2
    *_, last = figures.table(grid, states, 2).splitlines()
    assert "done 2 of 5, failed 2" in last
    assert "seed1: failed: error: no luck\n" in capsys.readouterr().out

@pytest.mark.parametrize("memory, jobs", [(100, 4), (20, 2), (1, 1)])
def test_as_many_run_at_once_as_memory_allows(monkeypatch, memory, jobs):
    """soft_dqn.py needs 8 GiB; one is always tried."""
    monkeypatch.setattr(figures, "free_gib", lambda: memory)
    monkeypatch.setattr(figures.os, "sched_getaffinity", lambda _: range(4), raising=False)
    engine = figures.Local(args("2"))
    assert (engine.jobs, engine.threads) == (jobs, 4 // jobs)

def test_the_table_knows_what_is_left(tmp_path):
    grid = figures.cells(args("1", tmp_path, games=("pong",), seeds=2, frames="400k"))
    for cell, sps in zip(grid, (500, 250)):
        folder = cell.folder / "run"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"step,sps\n10000,900\n50000,{sps}\n60000,70")  # torn
    states = dict.fromkeys(grid, "left") | {grid[1]: "done"}
    lines = figures.table(grid, states, 1).splitlines()
    assert lines[0].split() == "A2C Pong done 0 of 2, failed 0, frames 200k of 800k".split()
    assert lines[1].split() == "EntRL Pong done 1 of 2, failed 0, frames 400k of 800k".split()
    # 50,000 and 100,000 steps of A2C at 500 a second, 100,000 of EntRL at 250
    hours = f"{(150_000 / 500 + 100_000 / 250) / 3600:.1f} h"
    assert lines[2].split() == ("all done 1 of 4, failed 0, frames 600k of 1.6M, "
                                f"time left {hours} with 1 at once").split()

def test_a_lost_worker_of_a_ray_cluster_is_made_good(tmp_path, learner):
    """The worker is killed, and another goes on with its run from the checkpoint."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    cluster = Cluster(True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        runner = learner("--seeds", "1", "--engine", "ray", "--address", cluster.address,
                         extra=["--step-seconds", "0.2"])
        wait_for(lambda: len(steps(tmp_path)) > 2, runner)
        worker = int(Path(f"/proc/{pids(tmp_path)[0]}/stat").read_text().split()[3])
        assert b"ray::" in Path(f"/proc/{worker}/cmdline").read_bytes()
        os.kill(worker, signal.SIGKILL)
        out, err = runner.communicate(timeout=200)
        assert runner.returncode == 0, out + err
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert steps(tmp_path) == EVERY and len(pids(tmp_path)) == 2

# real trainings

def test_a_figure_from_the_command_line(tmp_path, monkeypatch):
    """Tiny; what two figures share, and what has finished, is run once; curves are the logs'."""
    folder = tmp_path / "results"

    def draw(figure, frames):
        flags = "--frames", str(frames), "--horizon", "40M", "--arms", "EntRL"
        assert called(monkeypatch, tmp_path, figure, *flags) == 0
        for name in ("figure{}.csv", "figure{}.png", "figure{}.svg", "scores{}.csv", "scores{}.md"):
            assert (folder / name.format(figure)).stat().st_size > 90
        score, = rows(folder, f"scores{figure}.csv")
        place, = folder.glob("a2c_proper*/Breakout/40M/seed1")
        last = rows(place, "eval.csv")[-1]
        assert float(score["mean"]) == pytest.approx(float(last["score_mean"]), rel=1e-5)
        assert int(score["frames"]) == 4 * int(last["step"]) == frames
        assert json.loads((place / "args.json").read_text())["args"]["num_envs"] == 2
        log, = tmp_path.glob("runs/*/*/*/*/log.txt")
        return log.read_text().count("agent steps on")  # how often a run began

    assert [draw("1", 800), draw("4", 800), draw("1", 800)] == [1, 1, 1]
    assert draw("1", 1200) == 2, "a later call with more frames goes on"
    run, = tmp_path.glob("runs/*/*/*/*/*/")
    assert [row["step"] for row in rows(run)] == ["100", "200", "300"]
    assert (run / "args200.json").exists()

# what is drawn

def test_curves_are_means_over_the_seeds_that_came_that_far(tmp_path):
    for seed, scores in ((1, [0, 10, 20]), (2, [4, 14])):
        folder = tmp_path / f"a2c_naive_tau_0.01/Pong/320M/seed{seed}"
        folder.mkdir(parents=True)
        lines = [f"{100 * (i + 1)},{3600 * seed * (i + 1)},{x}" for i, x in enumerate(scores)]
        (folder / "eval.csv").write_text("\n".join(["step,wall_time,score_mean", *lines]))
    curve = list(plots.curves("1", tmp_path))
    assert (curve[0]["frames"], curve[-1]["frames"]) == (400, 1200)
    for row in curve:
        line = (row["frames"] - 400) / 40
        both = row["frames"] <= 800
        assert row["seeds"] == 1 + both
        assert float(row["mean"]) == pytest.approx(line + 2 * both, abs=0.02)
        assert float(row["std"]) == (2 if both else 0)
        # an hour for each evaluation of seed 1, two for those of seed 2
        assert float(row["hours"]) == pytest.approx((1 + both / 2) * (1 + line / 10), abs=2e-3)
    score, = plots.final_scores("1", tmp_path)
    assert (score["mean"], score["seeds"], score["frames"]) == ("17", 2, 800)
    assert float(score["std"]) == pytest.approx(np.std([20, 14], ddof=1), rel=1e-5)
    assert (score["low"], score["high"]) == ("14", "20")
    text = "\n".join(plots.score_table("1", [score]))
    assert "Of the 36 runs of 320M frames: begun 2, complete 0." in text
    short = dict(score, horizon="40M", seeds=1)
    done = dict(score, frames=320_000_000, seeds=3)
    assert next(plots.score_table("1", [score, short, done])) == (
        "Of the 36 runs of 320M frames: begun 5, complete 3. On other schedules: 1.")
    assert "| Pong | A2C | 2 of 3 | 800 (320M) | 17.0 | 4.2 | 14.0 to 20.0 | 19.7 | 17.3 |" in text

def test_figure_4_has_a_panel_over_hours():
    rows = [dict(game="Pong", arm="natural", horizon="10M", seeds=1, frames=frames, hours=hours,
                 mean=score, std=0) for frames, hours, score in ((1e6, 3, -20), (1e7, 8, 15))]
    over = plots.picture("4", rows, {}).axes
    assert [ax.get_xlabel() for ax in over] == ["million frames", "hours of training"]
    assert [list(ax.get_lines()[0].get_xdata()) for ax in over] == [[1, 10], [3, 8]]

def test_bootstrap_interval_is_that_of_the_mean():
    scores = np.random.default_rng(1).normal(5, 2, 400)
    low, high = plots.interval(list(scores))
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.03)
    assert high == pytest.approx(scores.mean() + half, abs=0.03)
    assert plots.interval([3.0]) is None

@pytest.mark.parametrize("figure", "12345")
def test_committed_figures_come_from_the_committed_runs(figure, tmp_path):
    """By `python paper/plots.py`, byte for byte; nothing is drawn that is not committed."""
    made = {path.name: path for path in plots.draw(figure, plots.RESULTS, tmp_path)}
    committed = {path.name for path in plots.RESULTS.glob(f"*{figure}.*")}
    assert set(made) == committed
    for name, path in made.items():
        if not name.endswith((".png", ".svg")):  # these depend on the version of matplotlib
            assert path.read_bytes() == (plots.RESULTS / name).read_bytes(), name
