"""Kills training processes with SIGKILL at random instants, resumes them, checks what they leave.

    python tests/kill_loop.py --kills 100                 over all scripts, about 15 minutes
    python tests/kill_loop.py --kills 5 --only soft_dqn   whatever has that in its name

Real processes at tiny settings. A life begins when the process says that it writes or resumes a run
and ends a few rows and a moment later, or as soon as a save is then seen in its files. After every
kill the files must be fit to go on from; in the end every row is there once, the counters are
right, and where all resumptions were from periodic saves the rows, the network and the optimizer
are those of one unbroken run, bit for bit. What is called "rolling" also saves by the clock: there
all but the last holds. test_faults.py runs three kills of it.
"""
import argparse
import csv
import importlib
import io
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    os.environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")

from test_run import OWN, equal, rows

TOTAL, LOG, EVAL, SAVE, N = 1200, 30, 350, 100, 2  # agent steps, agent steps, ..., environments
FLAGS = dict(env_id="ALE/Breakout-v5", num_envs=N, total_timesteps=TOTAL, log_every=LOG,
             eval_every=EVAL, eval_episodes=2, checkpoint_every=SAVE, max_episode_frames=120,
             save_minutes=0.0, device="cpu", threads=1)
ROLLING = dict(save_minutes=0.002)
CASES = {  # script, its flags, whether resuming from a periodic save gives the unbroken run
    "a2c_naive": ("a2c_naive", {}, True),
    "a2c_proper": ("a2c_proper", {}, True),
    "a2c_proper rolling": ("a2c_proper", ROLLING, False),
    "pgql_equiv": ("pgql_equiv", {}, True),
    "natural_pg_damped": ("natural_pg_damped", {}, True),
    "natural_pg_damped rolling": ("natural_pg_damped", ROLLING, False),
    "soft_dqn": ("soft_dqn", {}, False),  # it refills its memory
    "soft_dqn --save-replay": ("soft_dqn", dict(save_replay=True), True),
    "soft_dqn --save-replay rolling": ("soft_dqn", dict(save_replay=True, **ROLLING), False),
}


class Victim:
    """One run of one case, in as many lives as it takes."""

    def __init__(self, case, folder, seed, rng, **flags):
        self.name, own, self.exact = CASES[case]
        self.script, self.folder, self.rng = importlib.import_module(self.name), Path(folder), rng
        self.flags = FLAGS | OWN.get(self.name, {}) | own | dict(seed=seed) | flags
        self.total = self.flags["total_timesteps"]
        self.run, self.resumed_from, self.started = None, [], 0  # what it was resumed from: states
        self.kills = self.in_save = 0

    def life(self, lethal):
        """Starts or resumes the run; kills it or waits until it is done. Returns whether it is."""
        state = self.state()
        if state:
            flags = ["--resume", str(self.run)]
            self.resumed_from.append(state)
        else:  # killed before the first save: there is nothing to go on from
            given = dict(self.flags, runs_dir=self.folder / str(self.started))
            flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}")
                     for k, v in given.items()]
            self.started += 1
        env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH="")
        process = subprocess.Popen([sys.executable, ROOT / f"{self.name}.py", *flags], env=env,
                                   text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith(("writes ", "resumes ")):
                assert line.startswith("resumes ") == bool(state)
                break
        else:
            raise AssertionError(f"did not start: {''.join(said)}")
        if not state:
            self.run, = (self.folder / str(self.started - 1)).iterdir()
        rest = threading.Thread(target=lambda: said.extend(process.stdout))  # or the pipe fills
        rest.start()
        stale = self.unfinished()
        if lethal:
            self.wait(process, stale)
            process.kill()
        code = process.wait()
        rest.join()
        if code == -9:
            self.kills += 1
            self.in_save += bool(self.unfinished() - stale)
            self.check()
            return False
        assert code == 0, f"exit code {code}: {''.join(said)}"
        return True

    def wait(self, process, stale):
        """Until some rows more and a moment later, or until a save is then seen.

        Only one new run in five is killed before its first checkpoint.
        """
        early, more = self.rng.random() < 0.2, self.rng.randint(0, 4)
        in_save, moment = self.rng.random() < 0.5, self.rng.random() / 5
        while not early and process.poll() is None and not (self.run / "checkpoint.pt").exists():
            time.sleep(0.001)
        until = self.written() + more
        while process.poll() is None and self.written() < until:
            time.sleep(0.001)
        while in_save and process.poll() is None and not self.unfinished() - stale:
            time.sleep(0.001)
        time.sleep(moment / 20 if in_save else moment)

    def written(self):
        """Rows of metrics.csv, and a line for its header."""
        return (self.run / "metrics.csv").read_bytes().count(b"\n")

    def unfinished(self):
        """What a save in progress, or one that was killed, has in the folder."""
        times = {}
        for name in ("checkpoint.pt", *(p.name for p in self.run.glob("replay-*.bin")),
                     "checkpoint.new"):
            with suppress(OSError):  # renamed or deleted meanwhile, or not there
                times[name] = (self.run / name).stat().st_mtime_ns
        saved = times.pop("checkpoint.pt", 0)
        return {(name, at) for name, at in times.items() if at > saved}

    def state(self):
        return self.run and (self.run / "checkpoint.pt").exists() and \
            self.script.read_checkpoint(self.run)

    def check(self):
        """After a kill: the checkpoint can be read, and the logs up to it are sound."""
        state = self.state()
        for log, every in (("metrics", LOG), ("eval", EVAL)) if state else ():
            text = (self.run / f"{log}.csv").read_bytes()[:state["logs"][log]].decode()
            assert not text or text.endswith("\n"), f"{log}.csv has a torn row"
            until = state["done_at"]["log" if log == "metrics" else "eval"]
            self.check_rows(list(csv.DictReader(text.splitlines())), every, until)

    def check_rows(self, found, every, until):
        """Each row that is due by a step is there once, and can be read."""
        batch = N * self.flags.get("num_steps", 5 if self.name != "soft_dqn" else 1)
        due = [step for step in range(batch, until + 1, batch)
               if step // every > (step - batch) // every or step == self.total]
        assert [int(row["step"]) for row in found] == due, f"{found} instead of {due}"
        for row in found:
            assert int(row["frames"]) == 4 * int(row["step"])
            assert None not in row and None not in row.values()
            for value in (v for k, v in row.items() if k != "policy"):
                float(value)

    def check_end(self, whole):
        """After the last life; whole is the folder of the unbroken run."""
        state, metrics = self.state(), rows(self.run)
        assert state["step"] == self.total
        self.check_rows(metrics, LOG, self.total)
        self.check_rows(rows(self.run, "eval.csv"), EVAL, self.total)
        rolling = {s["step"] for s in self.resumed_from if s["step"] > s["done_at"]["checkpoint"]}
        cut = N * ((self.total - 1) // SAVE + len(rolling))
        assert sum(int(row["games_cut"]) for row in metrics) == cut
        # no game is counted twice: all that ended fit into the steps
        played = sum(float(row["length_mean"]) * int(row["episodes"]) for row in metrics
                     if int(row["episodes"]))
        assert 0 < played <= self.total
        if self.exact and not rolling:
            states = [state, self.script.read_checkpoint(whole)]
            parts = {k for k in state if k.startswith(("net", "target", "optimizer"))}
            for name in (*parts, "step", "games_cut", "last100", "games", "sums", "updates"):
                assert equal(*(s[name] for s in states)), name
            assert metrics == rows(whole)
            assert rows(self.run, "eval.csv") == rows(whole, "eval.csv")

    def unbroken(self):
        """The folder of a run with the same flags that nothing stopped, in this process."""
        flags = dict(self.flags, runs_dir=str(self.folder / "whole"), save_minutes=0.0)
        with redirect_stdout(io.StringIO()):
            return self.script.train(self.script.Args(**flags))["folder"]


def kill_loop(case, kills, folder, seed=1, **flags):
    """Kills runs of a case until there were so many kills, and lets the last run end.

    Returns the kills, those of them during a save, the resumptions, the fresh starts and the runs.
    """
    rng, done, runs = random.Random(f"{case} {seed}"), [0, 0, 0, 0], 0
    while done[0] < kills or not runs:
        victim = Victim(case, Path(folder) / str(runs), seed + runs, rng, **flags)
        while not victim.life(lethal=done[0] + victim.kills < kills):
            pass
        victim.check_end(victim.unbroken() if victim.exact else None)
        counts = victim.kills, victim.in_save, len(victim.resumed_from), victim.started - 1
        done, runs = [a + b for a, b in zip(done, counts)], runs + 1
    return *done, runs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="in all, over the cases")
    parser.add_argument("--only", default="", help="cases that have this in their name")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    cases, failed = [case for case in CASES if args.only in case], False
    print(f"{'case':32} kills  in a save  resumed  afresh  runs  verdict", flush=True)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                counts = kill_loop(case, -(-args.kills // len(cases)), folder, args.seed)
                kills, in_save, resumed, fresh, runs = counts
                print(f"{case:32} {kills:5}  {in_save:9}  {resumed:7}  {fresh:6}  {runs:4}  ok",
                      flush=True)
            except Exception as e:
                failed = True
                print(f"{case:32} FAILED: {type(e).__name__}: {e}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
