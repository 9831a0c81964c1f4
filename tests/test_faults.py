"""What a long run meets: kills, signals, closed terminals, full disks, files that do not fit."""
import errno
import fcntl
import importlib
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from kill_loop import kill_loop
from test_run import alone, checkpoint, equal, resumed, rows, small, tiny, train_until


@pytest.fixture(autouse=True)
def no_survivors(monkeypatch):
    """Ends the processes that a failed test left running."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or
                        started[-1])
    yield
    for process in started:
        process.kill()


SEED = 295  # with it the loop lets each of these make a checkpoint and a row behind it first


@pytest.mark.parametrize("case", ["a2c_proper", "natural_pg_damped", "soft_dqn --save-replay"])
def test_killed_at_a_random_instant_and_resumed(case, tmp_path):
    """Real processes; `python tests/kill_loop.py --kills 100` for many more."""
    kills, _, resumed, afresh, runs = kill_loop(case, 1, tmp_path, SEED, total_timesteps=300)
    assert (kills, resumed, afresh, runs) == (1, 1, 0, 1)


# --- signals, real processes ---
FOREVER = "--total-timesteps", "1000000", "--checkpoint-every", "100"


def wait_for(process, condition):
    """The first true value of condition(), while the process lives."""
    deadline = time.time() + 120
    while not (value := condition()):
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return value


def logged(folder, n):
    """The run folder in a runs_dir once metrics.csv has n rows."""
    found = [p.parent for p in folder.glob("runs/*/metrics.csv") if p.read_text().count("\n") > n]
    return found[0] if found else None


def stopped(process, code, number):
    """Waits until the process has ended as the signal asked for; returns what it printed."""
    began = time.monotonic()
    out = process.communicate(timeout=60)[0]
    print(f"{time.monotonic() - began:.2f} s from {signal.Signals(number).name} to the end")
    assert process.returncode == code and time.monotonic() - began < 20, out
    assert "Traceback" not in out
    return out


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_the_run(script, tmp_path, number, code):
    """SIGINT in training, SIGTERM in an evaluation; what is resumed is deterministic."""
    games = "2" if number == signal.SIGINT else "1000000"
    process = alone(script, tmp_path / "x", *small(script), *FOREVER, "--eval-every", "200",
                    "--eval-episodes", games)
    folder = wait_for(process, lambda: logged(tmp_path / "x", 4))  # at step 200
    time.sleep(0.3)
    process.send_signal(number)
    out = stopped(process, code, number)
    state = checkpoint(script, folder)
    last = f"stopped at step {state['step']:,}; go on with --resume runs/{folder.name}"
    assert out.splitlines()[-1] == last and out.count("stopped") == 1
    if number == signal.SIGTERM:
        assert state["step"] == 200 and state["done_at"]["eval"] == 0
        return
    results = []
    for i in range(2):
        copy = shutil.copytree(folder, tmp_path / f"copy{i}")
        script.train(resumed(script, copy, total_timesteps=state["step"] + 60, eval_episodes=0))
        steps = [int(row["step"]) for row in rows(copy)]
        assert steps == sorted(set(steps)) and steps[-1] == state["step"] + 60
        results.append((rows(copy), checkpoint(script, copy)["net"]))
    assert results[0][0] == results[1][0] and equal(results[0][1], results[1][1])


def test_a_signal_before_the_first_update_saves_too(shared, tmp_path):
    """And whoever goes on from there loses nothing: the run equals one that was never stopped."""
    process = alone(shared, tmp_path / "x", *small(shared))
    assert process.stdout.readline().startswith("writes ")
    process.send_signal(signal.SIGTERM)
    stopped(process, 143, signal.SIGTERM)
    folder, = (tmp_path / "x" / "runs").iterdir()
    if (state := checkpoint(shared, folder))["step"] == 0:  # unless the machine is busy
        assert state["games_cut"] == 0
        shared.train(resumed(shared, folder))
        whole = shared.train(shared.Args(**state["args"] | dict(runs_dir=str(tmp_path))))["folder"]
        assert rows(folder) == rows(whole)


def test_an_interrupt_before_there_is_a_run_leaves_no_traceback(shared, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["a2c_proper.py"])
    with pytest.raises(BaseException) as stop:  # pytest itself would stop at a KeyboardInterrupt
        shared.main(shared.Args, interrupted, shared.__doc__)
    assert repr(stop.value) == "SystemExit(130)" and capsys.readouterr() == ("", "")


SLOW = """
import os, sys, time
import a2c_proper as script
fsync = os.fsync
def slow(fd):
    if os.path.exists("slow"):
        open("asleep", "w").close()
        time.sleep(120)
    fsync(fd)
os.fsync = slow
script.main(script.Args, script.train, script.__doc__)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_second_signal_acts_at_once(shared, tmp_path, number, code):
    """While a save takes for ever. The old checkpoint stays."""
    (tmp_path / "slow.py").write_text(SLOW)
    env = os.environ | dict(PYTHONPATH=str(Path(shared.__file__).parent))
    process = subprocess.Popen([sys.executable, "slow.py", *small(shared), *FOREVER], env=env,
                               cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True,  # whose SIGINT pytest, in the background, may ignore
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    folder = wait_for(process, lambda: logged(tmp_path, 3))
    (tmp_path / "slow").touch()
    wait_for(process, (tmp_path / "asleep").exists)
    before = (folder / "checkpoint.pt").read_bytes()
    process.send_signal(number)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(number)
    stopped(process, code, number)
    assert (folder / "checkpoint.pt").read_bytes() == before
    step = checkpoint(shared, folder)["step"] + 100
    assert shared.train(resumed(shared, folder, total_timesteps=step))["step"] == step


def test_a_closed_terminal_saves_and_ends_the_run(shared, tmp_path):
    """SIGHUP from the terminal, and nothing can be printed any more."""
    def in_a_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    master, slave = pty.openpty()
    shutil.copy(shared.__file__, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "a2c_proper.py", *small(shared), *FOREVER], cwd=tmp_path,
        stdin=slave, stdout=slave, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=in_a_terminal)
    os.close(slave)
    folder = wait_for(process, lambda: logged(tmp_path, 1))
    os.close(master)
    assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 129
    assert checkpoint(shared, folder)["step"] > 0 and not (folder / "checkpoint.new").exists()


def test_nohup_is_respected_and_a_signal_may_come_twice(shared, tmp_path, monkeypatch):
    """A SIGHUP that was ignored when the run began stays ignored; else it ends the run.

    That it comes twice at once, as from a closing terminal or the program timeout, is one signal.
    """
    goes_on, passed = shared.Run.goes_on, []

    def hung_up(self, *act):
        if self.step == 50:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
        return goes_on(self, *act)

    monkeypatch.setattr(shared.Run, "goes_on", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert shared.train(tiny(shared, tmp_path / "a", total_timesteps=60))["step"] == 60
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, lambda number, _: passed.append(number))
        with pytest.raises(SystemExit) as stop:
            shared.train(tiny(shared, tmp_path / "b"))
        assert stop.value.code == 129 and not passed
        os.kill(os.getpid(), signal.SIGHUP)
        assert passed == [signal.SIGHUP]  # the handler from before is back
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_leaves_does_not_end_the_run(shared, tmp_path):
    """python a2c_proper.py | head -1"""
    shutil.copy(shared.__file__, tmp_path)
    process = subprocess.Popen([sys.executable, "a2c_proper.py", *small(shared)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("writes ")
    process.stdout.close()
    assert not re.search("Traceback|rror:", process.stderr.read()) and process.wait(60) == 0
    folder = logged(tmp_path, 6)
    assert rows(folder)[-1]["step"] == "300" and len(rows(folder, "eval.csv")) == 1


# --- disks ---
def mounted(folder, *options):
    """Mounts a memory disk for a test, or skips the test."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")


@pytest.fixture
def small_disk(tmp_path):
    mounted(tmp_path / "disk", "-o", "size=80m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


@contextmanager
def full_disk(run, script):
    """Of small_disk; what is left of a file's last page still takes a part of a row."""
    filler = run.folder.parent / "filler"
    try:
        with open(filler, "wb", buffering=0) as f:
            while f.write(bytes(4096)):
                pass
    except OSError:
        pass
    yield
    filler.unlink()


@contextmanager
def file_size(limit):
    """No file can grow larger, which every user can set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room_for_a_row(run, script):
    return file_size((run.folder / "metrics.csv").stat().st_size + 40)


def no_room_for_a_checkpoint(run, script):
    """But for rows and segments."""
    return file_size((run.folder / "checkpoint.pt").stat().st_size // 2)


@contextmanager
def read_only(run, script):
    """As after an error of the file system, when Linux mounts it anew (which a test cannot)."""
    def refuse(path, mode="r", *rest, **more):
        if mode[0] in "wa":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, mode, *rest, **more)

    script.open = refuse
    yield
    del script.open


DISTURBED = dict(total_timesteps=200, checkpoint_every=60, log_every=10, eval_every=100,
                 eval_episodes=1, max_episode_frames=120)


def own(script):
    """More rows than fit into the page that full_disk leaves."""
    return dict(save_replay=True, log_every=2) if script.__name__ == "soft_dqn" else {}


def disturbed(script, monkeypatch, args, fault, begin, end=None, stop=None):
    """Trains with a fault between two steps; at stop comes a signal. Checks the files at its end.

    Returns the run's folder and the exception.
    """
    goes_on, runs, caught, before = script.Run.goes_on, [], None, []

    def look(folder):
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        before.append(dict(files))
        for name in ("metrics.csv", "eval.csv"):
            log, old = files.pop(name), before[0].get(name, b"")
            assert log.startswith(old) and log[-1:] in (b"", b"\n"), "a torn row"
        assert files == {k: v for k, v in before[0].items() if not k.endswith(".csv")}

    with monkeypatch.context() as patch, ExitStack() as stack:
        def watched(self, *act):
            if self.step >= begin and not runs:
                runs.append(self)
                look(self.folder)
                stack.enter_context(fault(self, script))
                self.saved_at -= 3600  # the next save by the clock is due
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            if runs and self.step == end:
                look(self.folder)
                stack.close()
                self.save()
                assert int(rows(self.folder)[-1]["step"]) == self.step, "a row is still waiting"
            return goes_on(self, *act)

        patch.setattr(script.Run, "goes_on", watched)
        try:
            script.train(args)
        except OSError as e:
            caught = e
            look(runs[0].folder)
    return runs[0].folder, caught


@pytest.fixture(params=[("a2c_proper", no_room_for_a_row), ("a2c_proper", read_only),
                        ("soft_dqn", no_room_for_a_checkpoint), ("soft_dqn", full_disk)],
                ids=lambda param: f"{param[0]}-{param[1].__name__}")
def disturbance(request, tmp_path):
    """A script (that with one file to save, that with segments beside it), a fault, a runs_dir."""
    name, fault = request.param
    disk = request.getfixturevalue("small_disk") if fault is full_disk else tmp_path / "runs"
    return importlib.import_module(name), fault, disk


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run of a script."""
    made = {}

    def find(script):
        if script not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[script] = script.train(tiny(script, folder, **DISTURBED | own(script)))["folder"]
        return made[script]

    return find


def assert_same(script, folder, whole):
    for log in ("metrics.csv", "eval.csv"):
        assert rows(folder, log) == rows(whole, log)
    states = [checkpoint(script, x) for x in (folder, whole)]
    parts = {k for k in states[0] if k.startswith(("net", "target", "optimizer"))}
    for name in (*parts, "step", "games_cut", "games", "last100", "sums"):
        assert equal(*(state[name] for state in states)), name


def test_a_run_outlives_a_fault_of_the_disk(disturbance, whole, monkeypatch, capsys):
    """The old checkpoint stands, rows wait in memory, and in the end nothing is missing."""
    saver, fault, runs_dir = disturbance
    args = tiny(saver, runs_dir, **DISTURBED | own(saver))
    folder, error = disturbed(saver, monkeypatch, args, fault, begin=70, end=150)
    out = capsys.readouterr().out.splitlines()
    assert error is None
    lost = [line for line in out if "could not be saved" in line]
    assert len(lost) == 2  # by the clock and at 120; not at every update
    assert all(line.startswith("warning: step ") and "last good checkpoint: " in line
               for line in lost)
    said = sum("metrics.csv: " in line and "wait in memory" in line for line in out)
    assert said == (fault is not no_room_for_a_checkpoint)
    assert_same(saver, folder, whole(saver))
    assert not (folder / "checkpoint.new").exists()
    if own(saver):
        needed = checkpoint(saver, folder)["memory"]["segments"]
        assert len(list(folder.glob("replay-*"))) == len(needed)
        saver.train(resumed(saver, folder, total_timesteps=220))  # its checksums fit


def test_a_fault_that_lasts_is_one_sentence_and_resume_mends_it(disturbance, whole, monkeypatch,
                                                                capsys):
    """At the end of training, and where a signal asks for a save."""
    saver, fault, runs_dir = disturbance
    args = tiny(saver, runs_dir, **DISTURBED | own(saver))
    found, stop = [], 150 if saver.__name__ == "soft_dqn" else None

    def train(_):
        folder, error = disturbed(saver, monkeypatch, args, fault, begin=70, stop=stop)
        found.append(folder)
        raise error

    monkeypatch.setattr(sys, "argv", [f"{saver.__name__}.py"])
    with pytest.raises(SystemExit) as ended:
        saver.main(saver.Args, train, saver.__doc__)
    err, folder = capsys.readouterr().err, found[0]
    assert ended.value.code == 1 and err.count("\n") == 1, err
    assert err.startswith(f"error: step {stop or 200} could not be saved in {folder} (")
    assert err.endswith(f"the last good checkpoint: {folder / 'checkpoint.pt'}\n")
    assert checkpoint(saver, folder)["step"] == 60
    saver.train(resumed(saver, folder))
    assert_same(saver, folder, whole(saver))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_on_a_full_disk_ends_no_run(shared, tmp_path, monkeypatch, capsys):
    args = tiny(shared, tmp_path, **DISTURBED, tensorboard=True)
    folder, error = disturbed(shared, monkeypatch, args, no_room_for_a_row, begin=70, end=150)
    assert error is None and len(rows(folder)) == 20 and checkpoint(shared, folder)["step"] == 200
    assert capsys.readouterr().out.count("TensorBoard gets no more rows") == 1


def test_a_disk_that_cannot_be_written_at_the_start_is_refused(shared, tmp_path, monkeypatch,
                                                               capsys):
    """A new run and one to resume; to evaluate, a folder that can be read is enough."""
    args = tiny(shared, tmp_path / "runs", total_timesteps=20, eval_episodes=1)
    folder = Path(shared.train(args)["folder"])
    mounted(tmp_path / "disk")
    try:
        copy = shutil.copytree(folder, tmp_path / "disk" / "run")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        for flags in (["--resume", copy], ["--runs-dir", tmp_path / "disk" / "new"]):
            code, err = command(shared, monkeypatch, capsys, *flags)
            assert code == 2 and err.count("\n") == 1
            assert "error: --runs-dir: cannot write to" in err and "Read-only file system" in err
        assert command(shared, monkeypatch, capsys, "--evaluate", copy) == (0, "")
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "disk")], check=True)


def test_a_run_to_resume_stays_as_it_is_if_its_disk_is_full(shared, tmp_path, monkeypatch, capsys):
    """Its rows behind the checkpoint, too: they are cut only once everything else is written."""
    args = tiny(shared, tmp_path, **DISTURBED)
    folder = train_until(shared, monkeypatch, args, 80)
    before = files(folder)
    with file_size(100):
        code, err = command(shared, monkeypatch, capsys, "--resume", folder)
    assert code == 2 and err.startswith("error: --runs-dir: cannot write to ")
    after = files(folder)
    assert after.pop("args-resumed-at-60.json") and after == before
    assert shared.train(resumed(shared, folder))["step"] == 200


def test_a_save_is_on_the_disk_before_what_it_replaces_goes(tmp_path, monkeypatch):
    """The order of writing, renaming and deleting; without the last step a power cut undoes it."""
    script, done = importlib.import_module("soft_dqn"), []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def synced(fd):
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("rename"), replace(*a)))
    monkeypatch.setattr(Path, "unlink", lambda *a: (done.append("delete"), unlink(*a)))
    script.train(tiny(script, tmp_path, checkpoint_every=60, save_replay=True, buffer_size=50,
                      total_timesteps=200))
    save = ["file"] * 4 + ["rename", "folder"]  # two logs, a segment, the checkpoint
    assert done == save + (save + ["delete"]) * 2 + save  # at 60, 120, 180 and 200


def test_a_file_system_that_cannot_sync_a_folder_will_do(shared, tmp_path, monkeypatch, capsys):
    fsync = os.fsync

    def refuse(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    before = len(os.listdir("/dev/fd"))
    shared.train(tiny(shared, tmp_path, save_minutes=1e-9, total_timesteps=110))
    assert "warning: step" not in capsys.readouterr().out
    assert len(os.listdir("/dev/fd")) < before + 5  # eleven saves leave nothing open


# --- checkpoints that do not fit ---
def command(script, monkeypatch, capsys, *flags):
    """The exit code of a command line and what it wrote to stderr."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    code = 0
    try:
        script.main(script.Args, script.train, script.__doc__)
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_damaged_foreign_and_hostile_checkpoints_are_refused(shared, tmp_path, monkeypatch,
                                                             capsys):
    """One sentence, exit code 2, and every file is left as it was."""
    folder = Path(shared.train(tiny(shared, tmp_path / "runs", total_timesteps=20))["folder"])
    bad = folder / "checkpoint.pt"
    good, content = torch.load(bad, weights_only=True), bad.read_bytes()

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    def refused(text, *flags):
        before = files(folder)
        for flag in ("--resume", "--evaluate"):
            code, err = command(shared, monkeypatch, capsys, flag, folder, *flags)
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
            assert text in err
        assert files(folder).items() >= before.items()

    for damaged in (b"", content[:50_000], content[:-1000], b"not a checkpoint",
                    pickle.dumps(Hostile(), protocol=2)):
        bad.write_bytes(damaged)
        refused("cannot be read as a checkpoint")
    torch.save(dict(good, extra=Hostile()), bad)
    refused("cannot be read as a checkpoint")
    assert not (tmp_path / "owned").exists(), "the checkpoint ran its code"
    torch.save(good["net"], bad)
    refused("cannot be read as a checkpoint")
    for number, age in ((99, "a newer"), (1, "an older")):
        torch.save(dict(good, format=number), bad)
        refused(f"is from {age} version of this script (format {number}, here {shared.FORMAT}); "
                "use that, the run's folder has a copy")
    torch.save(dict(good, script="other"), bad)
    refused("was made by other.py, this is a2c_proper.py")
    other = dict(good, args=dict(good["args"], env_id="ALE/Pong-v5", eval_episodes=1))
    torch.save(other, bad)  # the network of Breakout, which has fewer actions
    refused("does not fit")
    bad.unlink()
    refused("there is no checkpoint at")


def test_extending_a_run_that_ended_at_a_periodic_save_cuts_no_game_twice(shared, tmp_path):
    """It then equals one that was to be that long from the start."""
    flags = dict(checkpoint_every=60, log_every=40, schedule_timesteps=200)
    whole, short = (
        shared.train(tiny(shared, tmp_path / str(n), **flags, total_timesteps=n))["folder"]
        for n in (200, 120))
    shared.train(resumed(shared, short, total_timesteps=200))
    assert rows(short) == rows(whole) and len(rows(whole)) == 5
    assert sum(int(row["games_cut"]) for row in rows(whole)) == 3 * 2
