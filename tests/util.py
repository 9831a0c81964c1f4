"""Tiny runs, and what they leave in their folders."""
import csv
from pathlib import Path

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
