"""Every script as a user runs it: the file alone in an empty folder, a real game, processes.

Trained, killed, resumed, interrupted, finished, evaluated; and what the killed run became is held
against a run that was never disturbed. Wrong command lines, in this process, come last.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from util import OWN, ROOT, checkpoint, equal, resumed, rows, trained, words

FLAGS = dict(env_id="ALE/Breakout-v5", num_envs=2, total_timesteps=140, log_every=20,
             eval_every=100, eval_games=1, save_every=70, max_episode_frames=120, threads=1,
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

def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def test_a_script_alone_in_a_folder(script, tmp_path, start, command, monkeypatch):
    home = tmp_path / "an empty folder"
    home.mkdir()
    shutil.copy(ROOT / f"{script.__name__}.py", home)
    flags = FLAGS | OWN.get(script.__name__, {})
    if hasattr(script.Args, "save_replay"):  # without, a resumed run fills its memory anew
        flags = flags | dict(save_replay=True)
    process = start(script, home, *words(flags))
    text = printed(process, 100)
    process.kill()  # in the evaluation at step 100; the save was between two rows, at 70
    assert process.wait() == -signal.SIGKILL
    run, = (home / "runs").iterdir()
    assert checkpoint(script, run)["counts"]["step"] in (70, 80) and len(rows(run)) >= 5

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

    monkeypatch.chdir(home)
    assert command(script, *resume(text))[0] == 0
    assert [int(row["step"]) for row in rows(run)] == list(range(20, 241, 20))
    assert [int(row["step"]) for row in rows(run, "eval.csv")] == [100, 200, 240]
    before = {p: p.stat().st_mtime_ns for p in home.rglob("*")}
    code, out, _ = command(script, "--evaluate", run)
    assert code == 0 and f" {float(rows(run, 'eval.csv')[-1]['score_mean']):.1f} +- 0.0 in 1" in out
    assert before == {p: p.stat().st_mtime_ns for p in home.rglob("*")}, "it writes nothing"

WRONG = {  # command lines, and what the answer must name
    "--gamme 0.9": ["--gamme"],
    "--gamma abc": ["--gamma", "abc"],
    "--device tpu": ["--device", "tpu"],
    "--gamma 1.5": ["--gamma", "1.5"],
    "--num-envs 0": ["--num-envs", "0"],
    "--tau nan": ["--tau", "nan"],
    "--env-id ALE/Brakout-v5": ["--env-id", "Brakout", "Breakout"],
    "--resume nowhere": ["--resume", "nowhere"],
    "--evaluate nowhere": ["--evaluate", "nowhere"],
    "--resume run --gamma 0.5": ["--gamma", "0.5", "0.99"],
    "--resume run --seed 7": ["--seed", "7", "1"],
    "--resume run --total-timesteps 9": ["--total-timesteps", "9", "60"],
    "--runs-dir file": ["--runs-dir", "file"],
}

def test_wrong_command_lines_end_with_code_2_and_name_flag_and_value(four, tmp_path, command,
                                                                    monkeypatch):
    """Without a traceback, and before anything is written."""
    trained(four, tmp_path / "runs", total_timesteps=60).rename(tmp_path / "run")
    (tmp_path / "runs").rmdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    before, wrong = contents(tmp_path), []
    for line, named in WRONG.items():
        code, out, err = command(four, *line.split())
        text = " ".join(err.replace("│", " ").split())
        if code != 2 or out or "Traceback" in text or not all(x in text for x in named):
            wrong.append((line, code, out, err))
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 2, line
    assert not wrong, "\n".join(map(str, wrong))
