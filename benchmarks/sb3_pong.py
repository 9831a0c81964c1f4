"""A2C of Stable-Baselines3 on Pong: does it begin to learn as late as our A2C scripts?

    python benchmarks/sb3_pong.py 3000000       agent steps; what was saved before is continued

The settings of its zoo, its own wrappers, 16 games in one process, seed 1, one thread. Ctrl-C and
SIGTERM save. Needs pip install -e '.[bench]'. The model stays in runs/sb3_pong; the curve goes to
results/sb3_pong: score is the mean of the last 100 games in training, entropy that of the policy in
nats. After each start the games begin anew, and score is empty until the first one ends.
"""
import csv
import json
import math
import signal
import sys
from collections import deque
from pathlib import Path

import ale_py  # noqa: F401  it registers the games
import numpy as np
import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "runs" / "sb3_pong" / "model.zip"
RESULTS = ROOT / "results" / "sb3_pong"
COLUMNS = ("step", "score", "games", "entropy")
LOG_EVERY = 10_000  # agent steps between rows

def make_model(envs):
    from stable_baselines3 import A2C
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    if MODEL.exists():
        return A2C.load(MODEL, envs, device="cpu")
    optimizer = dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-5))
    return A2C("CnnPolicy", envs, n_steps=5, gamma=0.99, ent_coef=0.01, vf_coef=0.25, seed=1,
               max_grad_norm=0.5, learning_rate=7e-4, policy_kwargs=optimizer, device="cpu")

def main(total):
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
    torch.set_num_threads(1)
    envs = make_atari_env("PongNoFrameskip-v4", 16, seed=1, vec_env_cls=DummyVecEnv)
    model = make_model(VecFrameStack(envs, 4))
    for folder in (MODEL.parent, RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
    start, path, signals = model.num_timesteps, RESULTS / "curve.csv", []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: signals.append(1))
    if not start:
        path.write_text(",".join(COLUMNS) + "\n")
    (RESULTS / f"provenance-{start}.json").write_text(json.dumps(provenance(step=start), indent=1))

    class Log(BaseCallback):
        scores, next = deque(maxlen=100), start // LOG_EVERY * LOG_EVERY + LOG_EVERY

        def _on_step(self):
            self.scores.extend(i["episode"]["r"] for i in self.locals["infos"] if "episode" in i)
            return not signals

        def _on_rollout_end(self):  # the logger still has what the last update wrote
            if self.num_timesteps < self.next:
                return
            self.next += LOG_EVERY
            entropy = -self.logger.name_to_value.get("train/entropy_loss", math.nan)
            score = round(float(np.mean(self.scores)), 2) if self.scores else ""
            with open(path, "a") as f:
                csv.writer(f, lineterminator="\n").writerow(
                    (self.num_timesteps, score, len(self.scores), round(entropy, 6)))
            self.model.save(MODEL)

    model.learn(total - start, callback=Log(), reset_num_timesteps=False, log_interval=10**9)
    model.save(MODEL)

if __name__ == "__main__":
    main(int(sys.argv[1]))
