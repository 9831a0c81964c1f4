"""A run from start to end: logs, saves, resume, signals, bad input, copies of single files."""
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TIME = {"wall_time", "sps", "cg_seconds"}  # the columns that two equal runs may differ in
TINY = dict(env_id="ALE/Breakout-v5", num_envs=2, total_timesteps=400, log_every=70, eval_every=0,
            eval_episodes=0, checkpoint_every=0, max_episode_frames=300, device="cpu")
OWN = {"soft_dqn": dict(learning_starts=40, buffer_size=300, batch_size=4,
                        target_network_frequency=100),  # what is tiny for one script
       "natural_pg_damped": dict(num_steps=10, n_step=3, minibatch_size=10, passes=1,
                                 value_passes=1, measure_every=7, cg_iterations=2)}


def tiny(script, folder, **flags):
    return script.Args(**(TINY | OWN.get(script.__name__, {}) | dict(runs_dir=str(folder)) | flags))


def rows(folder, name="metrics.csv"):
    """The rows of a log as text, without the columns of time."""
    with open(Path(folder) / name, newline="") as f:
        return [{k: v for k, v in row.items() if k not in TIME} for row in csv.DictReader(f)]


def checkpoint(script, folder):
    return script.read_checkpoint(folder)


def equal(a, b):
    """Whether two nested states are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def resumed(script, folder, **flags):
    """The flags of a saved run, to go on from it."""
    saved = script.read_checkpoint(folder)["args"]
    return script.Args(**(saved | dict(resume=str(folder)) | flags))


class Killed(BaseException):
    pass


def train_until(script, monkeypatch, args, step):
    """Trains until the process would be killed at a step; returns the run's folder."""
    folder, goes_on = [], script.Run.goes_on

    def killed(self, *act):
        folder.append(self.folder)
        if self.step >= step:
            raise Killed
        return goes_on(self, *act)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script.Run, "goes_on", killed)
        script.train(args)
    return folder[0]


def test_two_runs_of_a_seed_are_equal_and_evaluation_does_not_disturb(script, tmp_path):
    flags = dict(eval_every=150, eval_episodes=3)
    results = [script.train(tiny(script, tmp_path / str(i), **extra))
               for i, extra in enumerate((flags, flags, {}, dict(flags, seed=2)))]
    logs = [rows(result["folder"]) for result in results]
    assert len(logs[0]) == 6 and logs[0][-1]["step"] == "400"
    assert logs[0] == logs[1] == logs[2] != logs[3]
    assert rows(results[0]["folder"], "eval.csv") == rows(results[1]["folder"], "eval.csv")
    nets = [checkpoint(script, result["folder"])["net"] for result in results]
    assert equal(nets[0], nets[2]) and not equal(nets[0], nets[3])
    assert results[0]["eval_episodes"] == 4 and results[0]["step"] == 400


def test_killed_twice_and_resumed_equals_an_unbroken_run(script, tmp_path, monkeypatch):
    """Over three periodic saves, with rows and evaluations that straddle them."""
    flags = dict(checkpoint_every=120, eval_every=170, eval_episodes=2)
    if hasattr(script.Args, "save_replay"):
        flags["save_replay"] = True  # without, a resumed run refills its memory
    whole = script.train(tiny(script, tmp_path / "whole", **flags))["folder"]
    broken = train_until(script, monkeypatch, tiny(script, tmp_path / "broken", **flags), 210)
    assert len(rows(broken)) == 3  # of which the third is behind the checkpoint at 120
    assert train_until(script, monkeypatch, resumed(script, broken), 390) == broken
    script.train(resumed(script, broken))
    assert rows(broken) == rows(whole) and len(rows(whole)) == 6
    assert rows(broken, "eval.csv") == rows(whole, "eval.csv") and len(rows(whole, "eval.csv")) == 3
    assert sum(int(row["games_cut"]) for row in rows(whole)) == 3 * 2
    states = [checkpoint(script, folder) for folder in (whole, broken)]
    optimizers = {name for name in states[0] if name.startswith("optimizer")}
    for name in ("net", *optimizers, "step", "last100", "games", "sums"):
        assert equal(states[0][name], states[1][name]), name
    infos = [json.loads(p.read_text()) for p in sorted(Path(broken).glob("args-resumed-at-*.json"))]
    assert [info["args"]["seed"] for info in infos] == [1, 1]


def test_periodic_saves_restart_the_games(shared, tmp_path):
    """What is learnt with them differs from what is learnt without: the flag changes the result."""
    a, b = (shared.train(tiny(shared, tmp_path / str(n), checkpoint_every=n))["folder"]
            for n in (0, 120))
    assert rows(a) != rows(b)


def test_extending_a_run_keeps_its_horizon(a2c, tmp_path):
    folder = a2c.train(tiny(a2c, tmp_path, schedule_timesteps=1000))["folder"]
    a2c.train(resumed(a2c, folder, total_timesteps=600))
    rates = [float(row["learning_rate"]) for row in rows(folder)]
    lr = a2c.Args().learning_rate
    steps = [int(row["step"]) for row in rows(folder)]
    assert steps[-1] == 600
    for step, rate in zip(steps, rates):
        assert rate == pytest.approx(lr * (1 - (step - 10) / 1000), rel=1e-5)


def test_resume_refuses_flags_that_change_the_result(shared, tmp_path):
    folder = shared.train(tiny(shared, tmp_path))["folder"]
    before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
    for flags, text in ((dict(gamma=0.5), "--gamma 0.5: the run to resume has 0.99"),
                        (dict(env_id="ALE/Pong-v5"), "--env-id ALE/Pong-v5"),
                        (dict(seed=9), "--seed 9"), (dict(num_envs=4), "--num-envs 4"),
                        (dict(schedule_timesteps=800), "--schedule-timesteps 800"),
                        (dict(total_timesteps=300), "--total-timesteps 300: it is at 400")):
        with pytest.raises(shared.Refused, match=text):
            shared.train(resumed(shared, folder, **flags))
    assert before == {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_a_run_in_use_is_locked(shared, tmp_path, monkeypatch):
    args = tiny(shared, tmp_path, checkpoint_every=120)
    folder, goes_on = [], shared.Run.goes_on

    def second(self, *act):
        if self.step == 200:
            folder.append(self.folder)
            with pytest.raises(shared.Refused, match="another process is training"):
                shared.Run(resumed(shared, self.folder), {})
        return goes_on(self, *act)

    monkeypatch.setattr(shared.Run, "goes_on", second)
    shared.train(args)
    assert folder and len(rows(folder[0])) == 6


def test_logs_that_lost_rows_are_refused_and_left_alone(shared, tmp_path, monkeypatch):
    """Also the one that has more rows than the checkpoint knows of."""
    args = tiny(shared, tmp_path, checkpoint_every=120, eval_every=100, eval_episodes=1)
    folder = train_until(shared, monkeypatch, args, 210)
    metrics = (folder / "metrics.csv").read_text()
    (folder / "eval.csv").write_text("step\n")
    with pytest.raises(shared.Refused, match="eval.csv is shorter"):
        shared.train(resumed(shared, folder))
    assert (folder / "eval.csv").read_text() == "step\n"
    assert (folder / "metrics.csv").read_text() == metrics and metrics.count("\n") == 4


def test_a_signal_in_an_evaluation_leaves_it_due(shared, tmp_path, monkeypatch):
    """In the middle of training and at its end: the row comes when the run is resumed."""
    flags = dict(eval_every=200, eval_episodes=2)
    whole = shared.train(tiny(shared, tmp_path / "whole", **flags))["folder"]
    play_games, calls = shared.play_games, []

    def interrupted(*args):
        calls.append(args[2])
        if len(calls) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return play_games(*args)

    monkeypatch.setattr(shared, "play_games", interrupted)
    args = tiny(shared, tmp_path / "broken", **flags)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            shared.train(args)
        assert stop.value.code == 143
        folder, = (tmp_path / "broken").iterdir()
        args = resumed(shared, folder)
    shared.train(args)
    assert calls == [200, 200, 400, 400]
    logged = rows(folder, "eval.csv")
    assert [row["step"] for row in logged] == ["200", "400"]
    assert logged[0] == rows(whole, "eval.csv")[0]
    assert sum(int(row["games_cut"]) for row in rows(folder)) == 2  # by the first resumption
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_changes_nothing_and_ends_the_run(a2c, tmp_path, bad,
                                                                       monkeypatch):
    """The first of several bad updates is named, and the checkpoint before it stays."""
    losses, calls, nets = a2c.losses, [], []

    def spoilt(log_pi, V, *rest):
        calls.append(1)
        L, terms = losses(log_pi, V, *rest)
        factor = bad if len(calls) > 22 else 1.0
        return L * factor, dict(terms, loss=L * factor)

    count = a2c.Run.count

    def watched(self, *rest):
        nets.append({k: v.clone() for k, v in self.parts["net"].state_dict().items()})
        count(self, *rest)

    monkeypatch.setattr(a2c, "losses", spoilt)
    monkeypatch.setattr(a2c.Run, "count", watched)
    args = tiny(a2c, tmp_path, checkpoint_every=120)
    with pytest.raises(FloatingPointError, match=r"not finite.*\(loss -?(nan|inf).*checkpoint.pt"):
        a2c.train(args)
    assert len(nets) == 24  # found at the save at step 240
    assert equal(nets[21], nets[22]) and equal(nets[21], nets[23]) and not equal(nets[20], nets[21])
    folder, = tmp_path.iterdir()
    saved = checkpoint(a2c, folder)
    assert saved["step"] == 120 and equal(saved["net"], nets[11])


def test_tensorboard_mirrors_the_csv_and_purges_on_resume(shared, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    args = tiny(shared, tmp_path, checkpoint_every=120, tensorboard=True, eval_every=170,
                eval_episodes=2)
    folder = train_until(shared, monkeypatch, args, 210)
    shared.train(resumed(shared, folder))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for log, tag, column in (("metrics.csv", "metrics/entropy", "entropy"),
                             ("eval.csv", "eval/score_mean", "score_mean")):
        scalars = {e.step: e.value for e in events.Scalars(tag)}
        assert scalars == {int(row["step"]): pytest.approx(float(row[column]), rel=1e-4)
                           for row in rows(folder, log)}


def test_evaluating_a_checkpoint_repeats_the_logged_score_and_writes_nothing(script, tmp_path):
    folder = Path(script.train(tiny(script, tmp_path, eval_episodes=4))["folder"])
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    saved = checkpoint(script, folder)["args"]
    result = script.train(script.Args(**(saved | dict(evaluate=str(folder)))))
    logged = rows(folder, "eval.csv")[-1]
    assert result["score_mean"] == pytest.approx(float(logged["score_mean"]), rel=1e-5)
    assert result["policy"] == logged["policy"] and result["episodes"] == 4
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder]


def test_folder_holds_the_flags_the_code_and_the_hardware(shared, tmp_path):
    folder = Path(shared.train(tiny(shared, tmp_path, tau=0.02))["folder"])
    assert folder.name.startswith(f"Breakout__{shared.__name__}__seed1__2")
    about = json.loads((folder / "args.json").read_text())
    assert about["args"]["tau"] == 0.02 and about["torch"] == torch.__version__
    assert about["cores"] and "commit" in about and about["platform"]
    code = (ROOT / f"{shared.__name__}.py").read_bytes()
    assert (folder / f"{shared.__name__}.py").read_bytes() == code
    header = rows(folder)[0].keys()
    games = {f"score_{k}" for k in ("mean", "median", "min", "max")} | {"length_mean"}
    assert games | {f"last100_{k}" for k in games} <= header
    assert {"step", "frames", "episodes", "games_cut", "learning_rate"} <= header


def test_command_line_resume_takes_the_saved_flags(shared, tmp_path, monkeypatch, capsys):
    folder = shared.train(tiny(shared, tmp_path, gamma=0.9))["folder"]
    name = f"{shared.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, "--resume", folder, "--total-timesteps", "600"])
    shared.main(shared.Args, shared.train, shared.__doc__)
    state = checkpoint(shared, folder)
    assert state["step"] == 600 and state["args"]["gamma"] == 0.9
    monkeypatch.setattr(sys, "argv", [name, "--resume", folder, "--gamma", "0.99"])
    with pytest.raises(SystemExit):  # even the default, where the saved run has another value
        shared.main(shared.Args, shared.train, shared.__doc__)
    assert "--gamma 0.99: the run to resume has 0.9" in capsys.readouterr().err


def alone(script, folder, *flags):
    """Starts the script as a process that has nothing but the one file."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / f"{script.__name__}.py", folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, f"{script.__name__}.py", *flags]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


SMALL = ("--env-id ALE/Breakout-v5 --num-envs 2 --total-timesteps 300 --log-every 50 "
         "--eval-episodes 2 --max-episode-frames 300 --checkpoint-every 0 --device cpu").split()


def small(script):
    """The flags of SMALL and the script's own."""
    own = OWN.get(script.__name__, {}).items()
    return *SMALL, *(word for k, v in own for word in (f"--{k.replace('_', '-')}", str(v)))


def test_a_copied_file_trains_resumes_and_evaluates_alone(script, tmp_path):
    out = alone(script, tmp_path / "x", *small(script)).communicate()[0]
    folder, = (tmp_path / "x" / "runs").iterdir()
    assert "evaluation at step 300" in out and len(rows(folder)) == 6
    out = alone(script, tmp_path / "x", "--resume", str(folder), "--total-timesteps", "400")
    assert "resumes" in out.communicate()[0] and rows(folder)[-1]["step"] == "400"
    out = alone(script, tmp_path / "x", "--evaluate", str(folder)).communicate()[0]
    assert "evaluation at step 400" in out


def test_time_limit_inside_training_bootstraps_from_the_last_observation(a2c, tmp_path,
                                                                        monkeypatch):
    """Every truncated step carries V of the cut game's last observation, and only those do."""
    losses, seen = a2c.losses, []

    def watched(log_pi, V, rollout, *rest):
        seen.append((rollout.truncated.clone(), rollout.V_final.clone()))
        return losses(log_pi, V, rollout, *rest)

    monkeypatch.setattr(a2c, "losses", watched)
    a2c.train(tiny(a2c, tmp_path, env_id="ALE/Pong-v5", max_episode_frames=120))
    cut, V = (torch.stack(x) for x in zip(*seen))
    assert cut.sum() > 4 and torch.equal(V != 0, cut > 0)


def test_flags_are_documented(script):
    """Every flag has a help text, and those of time say their unit."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    for field in dataclasses.fields(script.Args):
        line = next(x for x in source.splitlines() if x.startswith(f"    {field.name}: "))
        assert "  # " in line, field.name
        if field.name.endswith(("_every", "_timesteps")):
            assert "agent steps" in line or "batches" in line, field.name
