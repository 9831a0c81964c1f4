"""Tiny runs, and what they leave in their folders."""
import csv
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TIME = {"wall_time", "sps", "cg_seconds"}  # the columns that two equal runs may differ in
TINY = dict(env_id="ALE/Breakout-v5", num_envs=2, total_timesteps=400, log_every=70, eval_every=0,
            eval_games=0, save_every=0, max_episode_frames=300, device="cpu", threads=1)
OWN = {"soft_dqn": dict(learning_starts=40, buffer_size=300, batch_size=4,
                        target_network_frequency=100),  # what is tiny for one script
       "natural_pg_damped": dict(num_steps=10, n_step=3, minibatch_size=10, passes=1,
                                 value_passes=1, measure_every=7, cg_iterations=2)}

def tiny(script, folder, **flags):
    """Args of a tiny run below a folder; flags change them."""
    return script.Args(**(TINY | OWN.get(script.__name__, {}) | dict(runs_dir=str(folder)) | flags))

def resumed(script, folder, **flags):
    """Args to go on with a saved run; flags change the saved ones."""
    return script.Args(**(checkpoint(script, folder)["args"] | dict(resume=str(folder)) | flags))

def trained(script, folder, **flags):
    """Trains a tiny run, the only one below the folder; returns the run's own folder."""
    script.train(tiny(script, folder, **flags))
    run, = Path(folder).iterdir()
    return run

class Killed(BaseException):
    pass

@contextmanager
def at(script, step, do):
    """Calls do(run) when a row may be due, from that step on, once."""
    log, called = script.Run.log, []

    def watched(self, *args, **columns):
        if self.step >= step and not called:
            called.append(1)
            do(self)
        return log(self, *args, **columns)

    script.Run.log = watched
    try:
        yield
    finally:
        script.Run.log = log

def killed(script, folder, step, **flags):
    """A run's folder as a kill leaves it at a step."""
    def kill(run):
        raise Killed

    with at(script, step, kill), pytest.raises(Killed):
        script.train(tiny(script, folder, **flags))
    run, = Path(folder).iterdir()
    return run

def words(flags):
    """Flags as on the command line."""
    return [word for name, x in flags.items() for word in (f"--{name.replace('_', '-')}", str(x))
            if word != "True"]

def rows(folder, name="metrics.csv"):
    """The rows of a log as text, without the columns of time."""
    with open(Path(folder) / name, newline="") as f:
        return [{k: v for k, v in row.items() if k not in TIME} for row in csv.DictReader(f)]

def checkpoint(script, folder):
    return torch.load(Path(folder) / script.CHECKPOINT, weights_only=True)

def equal(a, b):
    """Whether two nested states are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b

class Game:
    """In place of Atari, which takes most of a second to start: noise, with rewards that depend on
    action and picture. Lives are lost and games end as there.
    """
    def __init__(self, args, num_envs):
        self.n_actions, self.N, self.limit = 4, num_envs, args.max_episode_frames // 4

    def pictures(self, n):
        return self.random.integers(0, 256, (self.N, n, 84, 84), dtype=np.uint8)

    def reset(self, seeds):
        self.random, self.ended = np.random.default_rng(seeds), []
        self.score, self.length = np.zeros((2, self.N))
        self.obs = self.pictures(4)
        return torch.from_numpy(self.obs)

    def send(self, actions):
        self.paid = actions.numpy() == self.obs[:, 3, 0, 0] % 4

    def recv(self):
        last = np.concatenate([self.obs[:, 1:], self.pictures(1)], 1)
        self.score, self.length = self.score + 2 * self.paid, self.length + 1
        chance = self.random.random(self.N)
        truncated = (self.length >= self.limit) & (chance > 0.05)
        over = truncated | (chance < 0.02)
        self.ended += [(i, float(self.score[i]), float(self.length[i]))
                       for i in over.nonzero()[0]]
        self.obs = np.where(over[:, None, None, None], self.pictures(4), last)
        self.score, self.length = self.score * ~over, self.length * ~over
        cut = torch.from_numpy(last[truncated]) if truncated.any() else None
        arrays = self.obs, 2.0 * self.paid.astype(np.float32), chance < 0.05, truncated
        return *map(torch.from_numpy, arrays), cut
