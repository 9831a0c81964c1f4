"""Every script as a user runs it: processes, the file alone in an empty folder, a real game.

Trained, killed, resumed, interrupted, resumed, finished, evaluated; and what the killed run became
is held against a run that was never disturbed.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from util import OWN, ROOT, checkpoint, equal, resumed, rows, trained

FLAGS = dict(env_id="ALE/Breakout-v5", num_envs=2, total_timesteps=140, log_every=20,
             eval_every=100, eval_games=2, save_every=60, max_episode_frames=120, threads=1,
             device="cpu")

@pytest.fixture
def start(monkeypatch):
    """Starts a script in a folder; what a failed test leaves running is killed."""
    started = []

    def run(script, folder, *words):
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        process = subprocess.Popen(
            [sys.executable, f"{script.__name__}.py", *words], cwd=folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # not ignored: no &
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()

def printed(process, step):
    """What a process prints up to its row of that step."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if int((re.match(r"step ([\d,]+), ", line) or [0, "0"])[1].replace(",", "")) >= step:
            return "".join(lines)
    raise AssertionError("".join(lines))

def resume(text):
    """The flags that a run says will resume it."""
    return shlex.split(re.search(r"--resume .*", text)[0])

def test_a_script_alone_in_a_folder(script, tmp_path, start, command):
    home = tmp_path / "an empty folder"
    home.mkdir()
    shutil.copy(ROOT / f"{script.__name__}.py", home)
    flags = FLAGS | OWN.get(script.__name__, {})
    words = [w for k, x in flags.items() for w in (f"--{k.replace('_', '-')}", str(x))]
    if hasattr(script.Args, "save_replay"):  # without, a resumed run fills its memory anew
        flags, words = flags | dict(save_replay=True), [*words, "--save-replay"]
    process = start(script, home, *words)
    text = printed(process, 100)
    process.kill()  # in the evaluation at step 100, with two rows behind the save at 60
    assert process.wait() == -signal.SIGKILL
    run, = (home / "runs").iterdir()
    assert checkpoint(script, run)["counts"]["step"] in (60, 120) and len(rows(run)) >= 5

    copy = shutil.copytree(run, tmp_path / "copy")  # it goes on undisturbed, in this process
    script.train(resumed(script, copy))
    whole = trained(script, tmp_path / "whole", **flags)
    for log, n in (("metrics.csv", 7), ("eval.csv", 2)):
        assert rows(copy, log) == rows(whole, log) and len(rows(whole, log)) == n
    states = [checkpoint(script, folder) for folder in (copy, whole)]
    for part in states[0].keys() - {"args", "counts"}:
        assert equal(*(state[part] for state in states)), part

    process = start(script, home, *resume(text), "--total-timesteps", "240")
    out = printed(process, 140)
    process.send_signal(signal.SIGINT)
    out += process.stdout.read()
    assert process.wait() == 130 and "Traceback" not in out, out
    assert checkpoint(script, run)["counts"]["step"] >= 140
    assert rows(run)[:7] == rows(whole)  # the raised total has not changed their schedule

    process = start(script, home, *resume(text))
    out = process.stdout.read()
    assert process.wait() == 0, out
    assert [int(row["step"]) for row in rows(run)] == list(range(20, 241, 20))
    assert [int(row["step"]) for row in rows(run, "eval.csv")] == [100, 200, 240]

    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    code, out, _ = command(script, "--evaluate", run)
    last = rows(run, "eval.csv")[-1]
    score = f"{float(last['score_mean']):.1f} +- {float(last['score_std']):.1f} in 2 games"
    assert code == 0 and out == f"step 240: score {score}\n"
    assert before == {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    assert {p.name for p in home.iterdir()} == {f"{script.__name__}.py", "runs"}
    assert list((home / "runs").iterdir()) == [run]
