"""How fast? Agent steps per second (4 emulator frames each), beside Stable-Baselines3 (SB3).

    pip install -e '.[bench]'
    python benchmarks/throughput.py --csv a2c.csv
    python benchmarks/throughput.py --only emulator soft_dqn sb3_dqn sb3_dqn_envs --num-envs 8 \
        --steps 1600 --csv dqn.csv
    python benchmarks/throughput.py --only emulator a2c_proper --num-envs 8 16 32 64 128 --rounds 3

    emulator         the games alone, actions uniformly random: the ceiling for learners on it
    a2c_proper, ...  any of the five scripts as it trains, with its log and without evaluations;
                     soft_dqn past --learning-starts
    a2c_proper_compiled, ...   the same with --compile; its compilation falls into the warm-up
    sb3              A2C of SB3 as its users run it on Atari, one process per environment
    sb3_our_envs     the same A2C on the emulator of a2c_proper.py, which leaves the learner's share
    sb3_dqn          DQN of SB3 as its users run it on Atari: one environment, an update in 4 steps
    sb3_dqn_envs     the same with --num-envs processes and as many updates a step

Every measurement is a process of its own, so that no contestant inherits the threads or the memory
of another, and all of them take turns in every round, so that a load on the machine that comes and
goes meets all alike; ratios are taken within a round. Run it on a machine that does nothing else.
"""
import csv
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import a2c_proper  # noqa: E402

SCRIPTS = "a2c_naive", "a2c_proper", "soft_dqn", "pgql_equiv", "natural_pg_damped"
LEARNING_STARTS, MEMORY = 1000, 10_000  # of the DQNs; a larger memory is no slower, only larger

@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Breakout-v5"  # game, ALE/<Game>-v5
    num_envs: tuple[int, ...] = (16,)  # environments stepped together; a table for each number
    steps: int = 8000  # agent steps measured per contestant and round, warm-up not counted
    rounds: int = 5  # measurements of every contestant
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks; auto: CUDA where it exists
    threads: int = 0  # CPU threads of PyTorch and of our emulator; 0: their own choice
    only: tuple[str, ...] = ("emulator", "a2c_proper", "a2c_proper_compiled", "sb3",
                             "sb3_our_envs")  # contestants
    csv: str = ""  # file for the single measurements; a .json with the provenance goes beside it

def warm_up(args):
    """Steps before the measured ones: caches, memory pools and worker processes settle."""
    return max(1000, args.steps // 10)

def processes():
    """This process, then its children; nothing where psutil is missing."""
    if not importlib.util.find_spec("psutil"):
        return []
    import psutil
    return [psutil.Process(), *psutil.Process().children(recursive=True)]

def cpu_seconds():
    """CPU time so far, of the children too, which getrusage does not count before they end."""
    times = [p.cpu_times() for p in processes()[1:]]
    return time.process_time() + sum(t.user + t.system for t in times)

def memory():
    """MiB in use now; asked at the end of a measurement, when it no longer grows.

    The resident sets (RSS) count a page that k processes share k times, the proportional ones (PSS,
    Linux only) once. On the GPU it is the peak that PyTorch allocated, without the CUDA context.
    """
    full = [p.memory_full_info() for p in processes()]
    sums = dict(rss_mib=sum(m.rss for m in full), gpu_mib=torch.cuda.max_memory_allocated(),
                pss_mib=sum(getattr(m, "pss", math.nan) for m in full))
    return {name: total / 2**20 for name, total in sums.items()}

def measure(args, run):
    """Calls run(steps), which returns the steps it made, to warm up and again to measure it."""
    run(warm_up(args))
    cpu, start = cpu_seconds(), time.monotonic()
    steps = run(args.steps)  # its updates end by reading their losses: the GPU has nothing left
    seconds, cpu = time.monotonic() - start, cpu_seconds() - cpu
    return dict(steps=steps, seconds=seconds, cpu_s=cpu, **memory())

def emulator(args):
    """No network; the process still has PyTorch loaded, which its memory shows."""
    envs, rng = atari(args), np.random.default_rng(1)

    def run(steps):
        for _ in range(0, steps, args.num_envs):
            envs.send(torch.from_numpy(rng.integers(envs.n_actions, size=args.num_envs)))
            envs.recv()
        return -(-steps // args.num_envs) * args.num_envs

    return measure(args, run)

def atari(args):
    """The environments of a2c_proper.py on the CPU, with games begun."""
    envs = a2c_proper.Atari(a2c_proper.Args(env_id=args.env_id, threads=args.threads,
                                            device="cpu"), args.num_envs)
    envs.reset(np.arange(args.num_envs))
    return envs

def our_script(name, args):
    """A script with its defaults from its first row to its last; the first ends the warm-up."""
    script, seen = importlib.import_module(name.removesuffix("_compiled")), []
    write, warm, flags = script.Run.write, warm_up(args), {}
    if script.__name__ == "soft_dqn":
        warm = LEARNING_STARTS + args.num_envs * 50
        flags = dict(learning_starts=LEARNING_STARTS, buffer_size=MEMORY)

    def look(run, *which, **row):
        write(run, *which, **row)
        seen.append(dict(steps=run.step, seconds=time.monotonic(), cpu_s=cpu_seconds(), **memory()))

    script.Run.write = look
    with tempfile.TemporaryDirectory() as runs_dir:
        script.train(script.Args(
            env_id=args.env_id, num_envs=args.num_envs, threads=args.threads, device=args.device,
            compile=name.endswith("_compiled"), total_timesteps=warm + args.steps, log_every=warm,
            eval_games=0, save_every=0, runs_dir=runs_dir, **flags))
    first, last = seen[0], seen[-1]
    return last | {k: last[k] - first[k] for k in ("steps", "seconds", "cpu_s")}

def sb3(args):
    """SB3 on its own wrappers. Its processes import this file again, and with it ale_py's games."""
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack
    game = args.env_id.removeprefix("ALE/")[:-3] + "NoFrameskip-v4"  # as the wrappers expect it
    envs = make_atari_env(game, args.num_envs, seed=1, vec_env_cls=SubprocVecEnv)
    return sb3_a2c(args, VecFrameStack(envs, 4))

def sb3_a2c(args, envs):
    """SB3's A2C with the settings of its zoo for Atari; verbose=0, it prints no log."""
    from stable_baselines3 import A2C
    from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
    optimizer = dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-5))
    model = A2C("CnnPolicy", envs, n_steps=5, gamma=0.99, ent_coef=0.01, vf_coef=0.25,
                max_grad_norm=0.5, learning_rate=7e-4, policy_kwargs=optimizer, seed=1,
                device=args.device)

    def run(steps):
        before = model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)  # else it would reset the games, too
        return model.num_timesteps - before

    result = measure(args, run)
    envs.close()
    return result

def sb3_our_envs(args):
    """SB3 on the emulator of a2c_proper.py; SB3 itself divides uint8 pictures by 255."""
    from stable_baselines3.common.vec_env import VecEnv

    class OurVecEnv(VecEnv):
        def __init__(self):
            self.atari = atari(args)
            envs = self.atari.envs
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

        def reset(self):
            return self.atari.reset(np.arange(self.num_envs)).numpy()

        def step_async(self, actions):
            self.atari.send(torch.from_numpy(actions))

        def step_wait(self):
            obs, reward, terminated, truncated, last = self.atari.recv()
            infos = [{} for _ in obs]
            for i, picture in zip(truncated.nonzero()[:, 0], () if last is None else last):
                infos[i] = {"terminal_observation": picture.numpy(), "TimeLimit.truncated": True}
            done = terminated | truncated
            return obs.numpy(), reward.sign().numpy(), done.numpy(), infos

        def close(self):
            self.atari.envs.close()

        def get_attr(self, attr_name, indices=None):  # SB3 asks for render_mode
            return [None] * self.num_envs

        set_attr = env_method = env_is_wrapped = None  # abstract in VecEnv, not called here

    return sb3_a2c(args, OurVecEnv())

def sb3_dqn(args, num_envs=1):
    """SB3's DQN with the settings of soft_dqn.py, without its memory's optional compression."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack
    game = args.env_id.removeprefix("ALE/")[:-3] + "NoFrameskip-v4"
    envs = make_atari_env(game, num_envs, seed=1,
                          vec_env_cls=SubprocVecEnv if num_envs > 1 else DummyVecEnv)
    model = DQN("CnnPolicy", VecFrameStack(envs, 4), learning_rate=1e-4, batch_size=32, gamma=0.99,
                train_freq=max(1, 4 // num_envs), gradient_steps=max(1, num_envs // 4), seed=1,
                buffer_size=MEMORY, learning_starts=LEARNING_STARTS, max_grad_norm=10,
                target_update_interval=40_000, device=args.device)

    def run(steps):
        before = model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)
        return model.num_timesteps - before

    run(LEARNING_STARTS)
    result = measure(args, run)
    envs.close()
    return result

def sb3_dqn_envs(args):
    return sb3_dqn(args, args.num_envs)

CONTESTANTS = dict(emulator=emulator, sb3=sb3, sb3_our_envs=sb3_our_envs, sb3_dqn=sb3_dqn,
                   sb3_dqn_envs=sb3_dqn_envs)
CONTESTANTS |= {name: partial(our_script, name) for script in SCRIPTS
                for name in (script, f"{script}_compiled")}

def measure_in_child(name, args):
    """One measurement of one contestant in a process of its own, as a row."""
    command = [sys.executable, __file__, "--one", name, json.dumps(vars(args))]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    row = json.loads(out.splitlines()[-1])  # before it stands what the contestant printed
    return dict(contestant=name, steps_per_s=row["steps"] / row["seconds"],
                cpu_s_per_1000_steps=1000 * row["cpu_s"] / row["steps"], **row)

def spread(values, form):
    """Median (min-max)."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"

def table(rows, names):
    """The rows of all rounds as the lines of a Markdown table."""
    of = {name: [row for row in rows if row["contestant"] == name] for name in names}
    speed = {name: [row["steps_per_s"] for row in of[name]] for name in names}
    peer = "sb3_dqn" if "sb3_dqn" in names else "sb3"
    gpu = any(row["gpu_mib"] for row in rows)
    yield (f"| contestant | steps/s | ratio to emulator | ratio to {peer} | CPU s per 1000 steps "
           "| RSS MiB | PSS MiB |" + " GPU MiB |" * gpu)
    yield "|---|---|---|---|---|---|---|" + "---|" * gpu
    for name in names:
        ratios = [spread([a / b for a, b in zip(speed[name], speed[base])], ".3g")
                  if base in names else "-" for base in ("emulator", peer)]
        keys = dict(cpu_s_per_1000_steps=".2f", rss_mib=".0f", pss_mib=".0f")
        keys |= dict(gpu_mib=".0f") if gpu else {}
        usage = [format(statistics.median(r[k] for r in of[name]), f) for k, f in keys.items()]
        yield " | ".join((f"| {name}", spread(speed[name], ".0f"), *ratios, *usage)) + " |"

def main(args):
    """Measures all rounds, prints the table and writes the rows with their provenance."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    args = dataclasses.replace(args, device=auto if args.device == "auto" else args.device)
    names, load = list(args.only), os.getloadavg() if hasattr(os, "getloadavg") else None
    if unknown := set(names) - set(CONTESTANTS):
        sys.exit(f"--only {unknown}: known are {', '.join(CONTESTANTS)}")
    if not all(map(importlib.util.find_spec, ("stable_baselines3", "psutil"))):
        print("sb3 is left out, and memory is 0: pip install -e '.[bench]'", flush=True)
        names = [name for name in names if not name.startswith("sb3")]
    rows = []
    for i in range(args.rounds):
        for N in args.num_envs:
            for name in names:
                row = measure_in_child(name, dataclasses.replace(args, num_envs=N))
                rows.append(dict(round=i + 1, num_envs=N) | row)
                print("round {round}: {num_envs} environments, {contestant} {steps_per_s:.0f} "
                      "steps/s".format(**rows[-1]), file=sys.stderr, flush=True)
    for N in args.num_envs:
        of_N = [row for row in rows if row["num_envs"] == N]
        print(f"\n{N} environments\n", *table(of_N, names), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        about = provenance(args=vars(args), load_at_start=load)
        about["threads"] = args.threads or about["threads"]  # set in the children only
        if any(name.startswith("sb3") for name in names):
            about["stable_baselines3"] = version("stable_baselines3")
        Path(args.csv).with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")

if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:  # a child: the name of a contestant and the flags as JSON
        args = Args(**json.loads(sys.argv[3]))
        if args.threads:
            torch.set_num_threads(args.threads)
        print("\n" + json.dumps(CONTESTANTS[sys.argv[2]](args)))
    else:
        main(tyro.cli(Args, description=__doc__))
