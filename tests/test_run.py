"""A run from start to end, in this process: logs, saves, resume, signals, faults."""
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
from contextlib import ExitStack, contextmanager

import pytest
import torch

from util import OWN, ROOT, TINY, at, checkpoint, equal, killed, resumed, rows, trained, words

pytestmark = pytest.mark.usefixtures("quick")

def replay(script):
    """The flag with which a resumed run of soft_dqn equals an unbroken one."""
    return dict(save_replay=True) if hasattr(script.Args, "save_replay") else {}

def leaves(tree, *path):
    """Yields (path, value) of a nested state."""
    if isinstance(tree, (dict, list, tuple)):
        for key, x in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(x, *path, key)
    else:
        yield path, tree

def tensors(tree):
    return [x for _, x in leaves(tree) if isinstance(x, torch.Tensor)]

def parts(script, folder):
    """What a run has learned: networks, optimizers, memory."""
    saved = checkpoint(script, folder)
    return {name: saved[name] for name in saved.keys() - {"args", "counts"}}

# --- training ---
def test_two_runs_of_a_seed_are_equal_and_evaluations_do_not_disturb(four, tmp_path):
    flags = dict(total_timesteps=120, schedule_timesteps=120, max_episode_frames=120)
    plain = trained(four, tmp_path / "plain", **flags)
    evaluated = trained(four, tmp_path / "evaluated", eval_every=70, eval_games=2, **flags)
    other = trained(four, tmp_path / "other", seed=2, **flags | dict(total_timesteps=70))
    assert rows(plain) == rows(evaluated) and rows(plain)[0] != rows(other)[0]
    assert [int(row["step"]) // 10 for row in rows(plain)] in ([7, 12], [8, 12])
    assert equal(parts(four, plain), parts(four, evaluated))
    assert len(rows(evaluated, "eval.csv")) == 2 and not rows(plain, "eval.csv")

def test_a_raised_total_goes_on_with_the_old_schedule(four, tmp_path):
    """As one run of that total and schedule does, bit for bit: it was saved at its first end."""
    flags = dict(save_every=80, log_every=40, **replay(four))
    whole = trained(four, tmp_path / "whole", total_timesteps=120, schedule_timesteps=80,
                    **flags)
    run = trained(four, tmp_path / "raised", total_timesteps=80, **flags)
    four.train(resumed(four, run, total_timesteps=120))
    assert rows(run) == rows(whole) and rows(whole)[-1]["step"] == "120"
    assert equal(*(parts(four, x) for x in (run, whole)))
    assert checkpoint(four, run)["args"]["schedule_timesteps"] == 80

def test_without_its_memory_a_resumed_run_is_deterministic(tmp_path):
    import soft_dqn
    run = killed(soft_dqn, tmp_path, 100, save_every=60, total_timesteps=140)
    copies = [shutil.copytree(run, tmp_path / str(i)) for i in range(2)]
    for copy in copies:
        soft_dqn.train(resumed(soft_dqn, copy))
    assert rows(copies[0]) == rows(copies[1]) and rows(copies[0])[-1]["step"] == "140"
    assert equal(*(parts(soft_dqn, copy) for copy in copies))

# --- resume ---
def test_an_evaluation_that_is_interrupted_is_due_in_the_resumed_run(four, tmp_path, command):
    """In the middle and at the end, which lies past a total that no whole batch meets."""
    flags = TINY | OWN.get(four.__name__, {}) | dict(
        num_envs=3, total_timesteps=100, eval_every=60, eval_games=2, max_episode_frames=120)
    start = words(flags | dict(runs_dir=tmp_path / "runs"))
    evaluate, before = four.Run.evaluate, []

    def interrupted(self, act):
        if self.due("eval") and self.step not in before:
            before.append(self.step)
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, act)

    four.Run.evaluate = interrupted
    try:
        assert command(four, *start)[0] == 130
        run, = (tmp_path / "runs").iterdir()
        assert checkpoint(four, run)["counts"]["step"] == before[0] < 100
        assert not rows(run, "eval.csv")
        assert command(four, "--resume", run)[0] == 130
    finally:
        four.Run.evaluate = evaluate
    assert len(rows(run, "eval.csv")) == 1 and checkpoint(four, run)["counts"]["step"] >= 100
    assert command(four, "--resume", run)[0] == 0
    assert [int(row["step"]) for row in rows(run, "eval.csv")] == before
    assert rows(run)[-1]["step"] == str(before[1])
    assert command(four, "--resume", run)[0] == 0  # there is nothing to do
    assert [int(row["step"]) for row in rows(run, "eval.csv")] == before
    code, _, err = command(four, "--resume", run, "--total-timesteps", "99")
    assert code == 2 and "--total-timesteps 99" in err and "100" in err

def test_evaluate_repeats_the_last_logged_score(four, tmp_path, command):
    """And writes nothing; other games come with another number of them."""
    run = trained(four, tmp_path, total_timesteps=60, eval_games=5, max_episode_frames=120)
    last, before = rows(run, "eval.csv")[-1], {p: p.stat().st_mtime_ns for p in run.iterdir()}
    score = f"{float(last['score_mean']):.1f} +- {float(last['score_std']):.1f}"
    assert command(four, "--evaluate", run) == (0, f"step 60: score {score} in 5 games\n", "")
    code, out, _ = command(four, "--evaluate", run, "--eval-games", "3")
    assert code == 0 and out.endswith("in 3 games\n") and score not in out
    assert before == {p: p.stat().st_mtime_ns for p in run.iterdir()}

def test_logs_that_lost_rows_are_refused(shared, tmp_path, command):
    run = killed(shared, tmp_path, 110, save_every=60, eval_every=50, eval_games=1,
                 max_episode_frames=120)
    (run / "eval.csv").write_text("step\n")
    code, _, err = command(shared, "--resume", run)
    assert code == 2 and "eval.csv has lost rows" in err and err.count("\n") == 1
    assert (run / "eval.csv").read_text() == "step\n"

def test_tensorboard_has_each_point_once(shared, tmp_path):
    """Also where save and evaluation coincide, with rows and an evaluation behind the save."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = killed(shared, tmp_path, 130, save_every=80, tensorboard=True, log_every=40,
                 eval_every=40, eval_games=1, max_episode_frames=120, total_timesteps=160)
    shared.train(resumed(shared, run))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for log in ("metrics", "eval"):
        logged = rows(run, f"{log}.csv")
        assert [row["step"] for row in logged] == ["40", "80", "120", "160"]
        for name in logged[0].keys() - {"step"}:
            points = events.Scalars(f"{log}/{name}")
            assert [point.step for point in points] == [40, 80, 120, 160], name
            values = [float(row[name]) for row in logged]
            assert [p.value for p in points] == pytest.approx(values, rel=1e-6, nan_ok=True), name

def test_a_checkpoint_has_tensors_and_plain_values_of_no_device(four, tmp_path):
    """What fuses or captures on one machine must not travel to another."""
    run = trained(four, tmp_path, total_timesteps=60, **replay(four))
    keys, values = zip(*leaves(checkpoint(four, run)))
    assert not {"param_groups", "fused", "capturable", "foreach"} & {x for k in keys for x in k}
    assert {type(x) for x in values} == {torch.Tensor, int, float, str, bool}
    assert not list(run.glob("*.new"))

def test_the_folder_holds_flags_code_and_circumstances(shared, tmp_path):
    run = trained(shared, tmp_path, tau=0.02, total_timesteps=60)
    assert run.name.startswith("Breakout__a2c_proper__seed1__2")
    shared.train(resumed(shared, run, total_timesteps=70))
    for name, total in (("args.json", 60), ("args60.json", 70)):
        about = json.loads((run / name).read_text())
        assert about["args"]["tau"] == 0.02 and about["args"]["total_timesteps"] == total
        assert about["torch"] == torch.__version__ and about["ale_py"] and about["command"]
        assert {"hardware", "commit", "time", "python"} <= about.keys()
    assert (run / "a2c_proper.py").read_bytes() == (ROOT / "a2c_proper.py").read_bytes()

# --- faults ---
@contextmanager
def file_size(limit):
    """No file can grow larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

@pytest.mark.parametrize("what", ["metrics.csv", "a2c_proper.pt"])
def test_a_full_disk_raises_and_leaves_the_last_checkpoint(shared, tmp_path, what):
    """Behind the save at 60: in the middle of the next row, or in the next checkpoint."""
    saved, disk = [], ExitStack()

    def fill(run):
        saved.append((run.folder / shared.CHECKPOINT).read_bytes())
        limit = (run.folder / what).stat().st_size - 1000 * what.endswith(".pt")
        disk.enter_context(file_size(limit))

    with at(shared, 70, fill), disk, pytest.raises((OSError, RuntimeError)):
        trained(shared, tmp_path, save_every=60, log_every=40, total_timesteps=120)
    run, = tmp_path.iterdir()
    assert (run / shared.CHECKPOINT).read_bytes() == saved[0]
    assert checkpoint(shared, run)["counts"]["step"] == 60
    shared.train(resumed(shared, run))
    assert [row["step"] for row in rows(run)] == ["40", "80", "120"]
    assert checkpoint(shared, run)["counts"]["step"] == 120 and not list(run.glob("*.new"))

def spoiled(script, folder, command, **flags):
    """What is printed when a parameter becomes NaN at step 80; the save at 60 stays."""
    def spoil(run):
        policy = next(iter(run.parts.values()))
        next(policy.parameters()).data.fill_(math.nan)

    flags = TINY | OWN.get(script.__name__, {}) | dict(save_every=60, runs_dir=folder) | flags
    with at(script, 80, spoil):
        code, _, err = command(script, *words(flags))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    saved = checkpoint(script, next(folder.iterdir()))
    assert saved["counts"]["step"] == 60
    assert all(x.isfinite().all() for x in tensors(saved))
    return err

def test_numbers_that_are_not_finite_end_the_run(four, tmp_path, command):
    """With one sentence at the next row; if a save comes first, at that."""
    err = spoiled(four, tmp_path / "row", command, log_every=50, total_timesteps=120)
    assert "not finite by step 1" in err and ": nan" in err
    err = spoiled(four, tmp_path / "save", command, log_every=0, total_timesteps=180)
    assert "a parameter of " in err and "not finite by step 120" in err

def test_flags_are_documented(script):
    """Every flag has a help text, and those of time say their unit."""
    source = (ROOT / f"{script.__name__}.py").read_text()
    for field in dataclasses.fields(script.Args):
        line = next(x for x in source.splitlines() if x.startswith(f"    {field.name}: "))
        assert "  # " in line, field.name
        if field.name.endswith(("_every", "_timesteps")):
            assert "agent steps" in line or "batches" in line, field.name
