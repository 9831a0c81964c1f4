"""paper/figures.py: the grids, the runner on both engines, what it draws, and what is committed."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from test_run import equal, rows

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "paper"))
import figures  # noqa: E402
import plots  # noqa: E402

TINY = ["--num-envs", "2", "--max-episode-frames", "200", "--eval-episodes", "2", "--log-every",
        "100"]


def args(figure="1", tmp_path=Path("nowhere"), **flags):
    return figures.Args(figure, runs_dir=str(tmp_path / "runs"),
                        results_dir=str(tmp_path / "results"), device="cpu", **flags)


def command(figure, tmp_path, *flags, extra=TINY):
    """A command line of figures.py for one game, two runs at once."""
    return [sys.executable, str(ROOT / "paper/figures.py"), figure, "--games", "breakout",
            "--seeds", "1", "--device", "cpu", "--jobs", "2", "--runs-dir", str(tmp_path / "runs"),
            "--results-dir", str(tmp_path / "results"), *flags, "--", *extra]


def run(*line, code=0, **flags):
    done = subprocess.run(command(*line, **flags), cwd=line[1], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done


# the grids

def test_the_grids_are_the_papers():
    counts = {k: len(figures.cells(args(k))) for k in "1234"}
    assert counts == {"1": 2 * 6 * 3, "2": 6 * 6 * 2, "3": 2 * 6 * 3, "4": 2 * 6 * 3}
    assert {cell.frames for cell in figures.cells(args("1"))} == {320_000_000}
    assert {cell.frames for cell in figures.cells(args("2"))} == {40_000_000}
    for figure in "1234":
        places = [cell.place for cell in figures.cells(args(figure))]
        assert len(set(places)) == len(places)
    first = figures.cells(args("1"))[0]
    assert (first.steps, first.horizon, first.eval_every) == (80_000_000, 320_000_000, 1_000_000)


def test_every_flag_of_the_grids_is_one_of_its_script():
    for figure in "1234":
        for script, *flags in figures.GRIDS["figures"][figure]["arms"].values():
            spec = importlib.util.spec_from_file_location(script[:-3], ROOT / script)
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            defaults = vars(module.Args())
            for flag, value in zip(flags[::2], flags[1::2]):
                kind = type(defaults[flag[2:].replace("-", "_")])
                assert kind(value) is not None


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


def test_a_cell_is_a_line_of_the_dry_run(tmp_path, capsys):
    figures.figure(args("2", tmp_path, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 72
    figures.figure(args("2", tmp_path, dry_run=True, cell=50))
    assert capsys.readouterr().out.splitlines() == [lines[49]]
    assert "--seed 2" in lines[49] and "ALE/Enduro-v5" in lines[49]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, text", [
    (dict(games=("Pacman",)), "--games Pacman: the figure has BeamRider"),
    (dict(arms=("soft",)), "--arms soft: the figure has A2C, EntRL"),
    (dict(frames="ten"), "ten is no number of frames"), (dict(frames="nan"), "nan is no number"),
    (dict(frames="1.5"), "1.5 is no number"), (dict(frames="400M"), "more than --horizon 320M"),
    (dict(seeds=-1), "--seeds -1"), (dict(cell=37), "--cell 37: there are 36")])
def test_bad_input_is_refused(flags, text):
    with pytest.raises(figures.Refused, match=text):
        figures.cells(args("1", **flags))


def test_numbers_of_frames():
    assert [figures.number(x) for x in ("2500000", "2.5M", "300k", "0.32B", "40m")] == [
        2_500_000, 2_500_000, 300_000, 320_000_000, 40_000_000]
    assert [figures.exact(x) for x in (40_000_000, 9_984_000, 79_361)] == ["40M", "9984k", "79361"]


# the runner, without training

class Fake:
    """Cells whose runs are small programs instead of trainings."""

    def __init__(self, monkeypatch, tmp_path, programs):
        grid = figures.cells(args("2", tmp_path, seeds=1))[:len(programs)]
        self.programs = dict(zip(grid, programs))
        monkeypatch.setattr(figures, "command_of", lambda cell, *_: ["-c", self.programs[cell]])
        monkeypatch.setattr(figures, "finished", lambda cell: (cell.folder / "done").exists())
        self.grid, self.seen = grid, []

    def run(self, **flags):
        engine = figures.Local(args("2", jobs=2, **flags))
        return engine, engine.run(self.grid, lambda states, end=False: self.seen.append(states))


def program(cell_folder, body):
    return f"import pathlib, time; d = pathlib.Path({str(cell_folder)!r}); {body}"


def test_a_failed_and_a_killed_run_are_reported_and_the_rest_goes_on(monkeypatch, tmp_path):
    folders = [cell.folder for cell in figures.cells(args("2", tmp_path, seeds=1))]
    done = "d.joinpath('done').touch()"
    fake = Fake(monkeypatch, tmp_path, [
        program(folders[0], "print('starting'); raise SystemExit('error: no luck')"),
        program(folders[1], "import os; os.kill(os.getpid(), 9)"),
        program(folders[2], done), program(folders[3], "pass"), program(folders[4], done)])
    _, states = fake.run()
    assert list(states.values()) == ["failed: error: no luck", "cut off", "done",
                                     "failed: exit code 0", "done"]
    lines = list(figures.table(fake.grid, states, 2))
    assert lines[-1].startswith("done 2  running 0  left 1  failed 2")


def test_no_more_run_at_once_than_jobs_and_memory_allow(monkeypatch, tmp_path):
    times = tmp_path / "times"
    times.mkdir()
    body = "t = time.time(); time.sleep(0.3); (d / 'done').touch(); pathlib.Path({!r}).joinpath(" \
           "d.parts[-4] + d.parts[-3]).write_text(f'{{t}} {{time.time()}}')"
    folders = [cell.folder for cell in figures.cells(args("2", tmp_path, seeds=1))[:4]]

    def most(memory):
        for file in (*times.iterdir(), *(folder / "done" for folder in folders)):
            file.unlink(missing_ok=True)
        monkeypatch.setattr(figures, "free_gib", lambda device: memory)
        fake = Fake(monkeypatch, tmp_path, [program(f, body.format(str(times))) for f in folders])
        _, states = fake.run()
        assert set(states.values()) == {"done"}
        spans = [tuple(map(float, path.read_text().split())) for path in times.iterdir()]
        assert len(spans) == 4
        return max(sum(a <= start < b for a, b in spans) for start, _ in spans)

    assert most(memory=100) == 2  # the jobs
    assert most(memory=9) == 1  # soft_dqn.py needs 8 GiB
    assert most(memory=1) == 1  # one is always tried


def test_the_table_knows_what_is_left(monkeypatch, tmp_path):
    grid = figures.cells(args("1", tmp_path, games=("pong",), seeds=2, frames="400k"))
    folder = grid[0].folder / "run"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,sps\n10000,900\n50000,500\n60000,70")  # torn
    states = dict.fromkeys(grid, "not done") | {grid[1]: "done"}
    lines = list(figures.table(grid, states, 1))
    assert lines[1].split()[:2] == ["A2C", "Pong"] and "200k of 800k" in lines[1]
    assert lines[2].split()[2] == "1" and "400k of 800k" in lines[2]
    # 50,000 and 100,000 steps of A2C, 100,000 of EntRL, at 500 a second
    assert lines[3] == ("done 1  running 0  left 3  failed 0  time left "
                        f"{250_000 / 500 / 3600:.1f} h with 1 at once")


def test_a_folder_in_use_is_not_trained_in_twice(monkeypatch, tmp_path):
    import fcntl
    monkeypatch.setattr(figures, "ORPHAN_SECONDS", 0.1)
    fake = Fake(monkeypatch, tmp_path, ["pass"])
    folder = fake.grid[0].folder / "run"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert fake.run()[1] == {fake.grid[0]: figures.BUSY}
    assert list(fake.run()[1].values()) == ["failed: exit code 0"]


# real trainings

def test_every_figure_from_the_command_line(tmp_path, monkeypatch):
    """Tiny; what two figures share, and what has finished, is run once; curves are the logs'."""
    some = {"1": ["A2C", "EntRL"], "2": ["soft (KL), tau=0.1"], "3": ["QL"],
            "4": ["natural", "EntRL"]}

    def called(*line):
        monkeypatch.setattr(sys, "argv", command(*line)[1:])
        with pytest.raises(SystemExit) as stop:
            figures.main()
        assert stop.value.code == 0

    for figure, arms in some.items():
        (run if figure == "1" else called)(figure, tmp_path, "--frames", "800", "--horizon", "40M",
                                           "--arms", *arms)
        folder = tmp_path / "results"
        for name in ("figure{}.csv", "figure{}.png", "figure{}.svg", "scores{}.csv", "scores{}.md"):
            assert (folder / name.format(figure)).stat().st_size > 100
        scores = rows(folder, f"scores{figure}.csv")
        expected = figures.GRIDS["figures"][figure]["arms"]
        assert {row["arm"] for row in scores} == set(arms) and len(scores) == len(arms)
        for row in scores:
            place = folder / plots.arm_folder((*expected[row["arm"]], *TINY)) / "Breakout/40M/seed1"
            last = rows(place, "eval.csv")[-1]
            assert float(row["mean"]) == pytest.approx(float(last["score_mean"]), rel=1e-5)
            assert row["frames"] == last["frames"] and 800 <= int(row["frames"]) < 1100
            assert json.loads((place / "args.json").read_text())["args"]["num_envs"] == 2
    made = sorted(tmp_path.glob("runs/*/*/*/*/*/checkpoint.pt"))
    assert len(made) == 2 + 1 + 1 + 1, "EntRL stands in two figures"
    before = [path.stat().st_mtime_ns for path in made]
    called("1", tmp_path, "--frames", "800", "--horizon", "40M")
    assert sorted(tmp_path.glob("runs/*/*/*/*/*/checkpoint.pt")) == made
    assert [path.stat().st_mtime_ns for path in made] == before
    # a later call with more frames goes on
    called("1", tmp_path, "--frames", "1200", "--horizon", "40M", "--arms", "EntRL")
    assert [p for p, t in zip(made, before) if p.stat().st_mtime_ns != t] == [
        p for p in made if "a2c_proper" in str(p)]
    log = rows(next(p.parent for p in made if "a2c_proper" in str(p)))
    assert [row["step"] for row in log] == ["100", "200", "300"]


def first_rows(tmp_path, count, process, arm="a2c_proper"):
    """Waits until a run has logged some rows and saved; returns its folder."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        for path in tmp_path.glob(f"runs/{arm}*/*/*/*/*/metrics.csv"):
            if path.read_text().count("\n") > count and path.with_name("checkpoint.pt").exists():
                return path.parent
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def trainings(folder):
    """Process ids of trainings below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"a2c_proper.py" in line and any(str(folder).encode() in word for word in line):
            found.append(int(path.parent.name))
    return found


LONG = [*TINY, "--checkpoint-every", "200", "--save-minutes", "0"]
PARTS = ["--frames", "6400", "--arms", "EntRL"]


def test_killed_in_the_middle_and_called_again_equals_an_unbroken_run(tmp_path):
    """First a run is killed, then the runner, which leaves no run behind; then all is finished."""
    line = command("1", tmp_path, *PARTS, extra=LONG)
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    folder = first_rows(tmp_path, 4, process)
    os.kill(trainings(tmp_path)[0], signal.SIGKILL)
    out = process.communicate()[0]
    assert process.returncode == 1 and "left 1" in out
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    first_rows(tmp_path, (folder / "metrics.csv").read_text().count("\n") + 1, process)
    process.kill()
    process.communicate()
    if sys.platform == "linux":
        until = time.monotonic() + 60
        while trainings(tmp_path) and time.monotonic() < until:
            time.sleep(0.1)
        assert not trainings(tmp_path)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    run("1", tmp_path, *PARTS, extra=LONG)
    assert len(list(folder.parent.glob("*/checkpoint.pt"))) == 1
    assert [int(row["step"]) for row in rows(folder)] == list(range(100, 1601, 100))
    if saved["step"] % 200 == 0:  # else the second stop saved between two periodic saves
        assert_equals_an_unbroken_run(folder, tmp_path)


def assert_equals_an_unbroken_run(folder, tmp_path):
    import a2c_proper
    broken = a2c_proper.read_checkpoint(folder)
    args = a2c_proper.Args(**(broken["args"] | dict(runs_dir=str(tmp_path / "whole"))))
    whole = a2c_proper.train(args)["folder"]
    for name in ("metrics.csv", "eval.csv"):
        assert rows(folder, name) == rows(whole, name) and len(rows(whole, name)) >= 10
    saved = a2c_proper.read_checkpoint(whole)
    assert all(equal(broken[name], saved[name]) for name in ("net", "optimizer", "step"))


def test_a_signal_to_the_runner_saves_the_runs(tmp_path):
    process = subprocess.Popen(command("1", tmp_path, *PARTS, extra=LONG), cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)
    folder = first_rows(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "left 1" in out
    log = (folder.parent / "log.txt").read_text()
    assert "stopped at step" in log and not trainings(tmp_path)


def test_a_lost_worker_of_a_ray_cluster_is_made_good(tmp_path):
    """Two nodes on this machine, two runs; the worker of one is killed, and its run goes on."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster
    head = dict(num_cpus=1, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    try:
        line = command("1", tmp_path, *PARTS[:2], "--engine", "ray", "--address", cluster.address,
                       extra=LONG)
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.PIPE)
        folder = first_rows(tmp_path, 2, process)
        child, = trainings(tmp_path)
        worker = int(Path(f"/proc/{child}/stat").read_text().split()[3])
        assert b"ray::" in Path(f"/proc/{worker}/cmdline").read_bytes()
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, out + err
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(list(tmp_path.glob("runs/a2c_*/*/*/*/*/checkpoint.pt"))) == 2
    assert list(folder.glob("args-resumed-at-*.json"))
    assert [int(row["step"]) for row in rows(folder)] == list(range(100, 1601, 100))


# what is drawn

def test_curves_are_means_over_the_seeds_that_came_that_far(tmp_path):
    for seed, scores in ((1, [0, 10, 20]), (2, [4, 14])):
        folder = tmp_path / f"a2c_naive_tau_0.01/Pong/320M/seed{seed}"
        folder.mkdir(parents=True)
        lines = [f"{100 * (i + 1)},{400 * (i + 1)},{x}" for i, x in enumerate(scores)]
        (folder / "eval.csv").write_text("\n".join(["step,frames,score_mean", *lines]))
    curve = list(plots.curves("1", tmp_path))
    assert (curve[0]["frames"], curve[-1]["frames"]) == (400, 1200)
    for row in curve:
        line = (row["frames"] - 400) / 40
        both = row["frames"] <= 800
        assert row["seeds"] == 1 + both
        assert float(row["mean"]) == pytest.approx(line + 2 * both, abs=0.02)
        assert float(row["std"]) == (2 if both else 0)
    score, = plots.final_scores("1", tmp_path)
    assert (score["mean"], score["seeds"], score["frames"]) == ("17", 2, 800)
    assert float(score["std"]) == pytest.approx(np.std([20, 14], ddof=1), rel=1e-5)
    assert (score["low"], score["high"]) == ("14", "20")
    text = "\n".join(plots.score_table("1", [score]))
    assert "Of the 36 runs of 320M frames: begun 2, complete 0." in text
    assert "| Pong | A2C | 2 of 3 | 800 (320M) | 17.0 | 4.2 | 14.0 to 20.0 | 19.7 | 17.3 |" in text


def test_bootstrap_interval_is_that_of_the_mean():
    scores = np.random.default_rng(1).normal(5, 2, 400)
    low, high = plots.interval(list(scores))
    half = 1.96 * scores.std() / 20
    assert low == pytest.approx(scores.mean() - half, abs=0.03)
    assert high == pytest.approx(scores.mean() + half, abs=0.03)
    assert plots.interval([3.0]) is None


@pytest.mark.parametrize("figure", "1234")
def test_committed_figures_come_from_the_committed_runs(figure, tmp_path):
    """By `python paper/plots.py`, byte for byte; nothing is drawn that is not committed."""
    made = {path.name: path for path in plots.draw(figure, plots.RESULTS, tmp_path)}
    committed = {path.name for path in plots.RESULTS.glob(f"*{figure}.*")}
    assert set(made) == committed
    for name, path in made.items():
        if not name.endswith((".png", ".svg")):  # these depend on the version of matplotlib
            assert path.read_bytes() == (plots.RESULTS / name).read_bytes(), name
