"""Where a step of a2c_proper.py spends its time, and what each lever is worth.

    python benchmarks/profile_a2c.py parts       the network's part of an update, by piece
    python benchmarks/profile_a2c.py shares      CPU time of whole updates: convolutions, emulator
    python benchmarks/profile_a2c.py groups      emulating one half while the network acts for the
                                                 other, against all at once
    options: --threads K, of PyTorch

Times are milliseconds, medians of 40 after 5 to warm up; alternatives take turns.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a2c_proper as script  # noqa: E402

T, N, ROUNDS, WARM = 5, 16, 40, 5
ARGS = script.Args(env_id="ALE/Breakout-v5", num_envs=N)


class Learner:
    """What train() has besides the games, on the CPU."""

    def __init__(self, n_actions):
        torch.manual_seed(0)
        self.net = script.ActorCritic(n_actions).to(memory_format=torch.channels_last)
        self.optimizer = script.RMSpropTF(self.net.parameters(), torch.tensor(7e-4))
        self.obs = torch.randint(0, 256, (T + 1, N, *script.OBS_SHAPE), dtype=torch.uint8)
        self.actions = torch.zeros((T, N), dtype=torch.int64)
        self.facts, self.V_final = torch.zeros(3, T, N), torch.zeros(T, N)
        self.kept, self.log_pi_bar = [None] * T, torch.zeros(n_actions)
        self.gumbel = script.gumbel_noise((T, N, n_actions), torch.Generator())

    @torch.no_grad()
    def act(self, t, which=slice(None)):
        log_pi = self.net(self.obs[t, which], self.kept, t)[0]
        self.actions[t, which] = script.sample(log_pi, self.gumbel[t, which])

    def loss(self, log_pi, V, V_n):
        rollout = script.Rollout(self.obs, self.actions, *self.facts, self.V_final)
        return script.losses(log_pi, V, rollout, V_n, self.log_pi_bar, 0.01, 0.99, 0.5)[0]

    def step(self, L):
        self.optimizer.zero_grad()
        L.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.5)
        self.optimizer.step(torch.isfinite(norm))

    @torch.no_grad()
    def V_n(self):
        return self.net(self.obs[T])[1]


def median_ms(seconds):
    return 1000 * statistics.median(seconds[WARM:])


def parts():
    """Prints a table of the parts of an update, the emulator apart; with and without each lever."""
    learner, seconds = Learner(6), {}
    net, obs = learner.net, learner.obs

    def timed(name, function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def to_channels_last(x):
        return x.to(torch.float32, memory_format=torch.channels_last) / 255

    def stacked(x):
        return torch.stack(x.unbind(1), -1).permute(0, 3, 1, 2).float().div_(255)

    for _ in range(WARM + ROUNDS):
        for rows in (obs[0], obs[:T].flatten(0, 1)):
            timed(f"{len(rows)} pictures to floats, by .to", to_channels_last, rows)
            timed(f"{len(rows)} pictures to floats, stacked", stacked, rows)
        timed(f"acting, {T} x {N}", lambda: [learner.act(t) for t in range(T)])
        V_n = timed("V(s_{t+n})", learner.V_n)
        for name, kept in (("a second pass", None), ("kept", learner.kept)):
            log_pi, V = timed(f"log pi and V of {T * N}, {name}", net, obs[:T], kept)
            L = timed("losses", learner.loss, log_pi, V, V_n)
            learner.optimizer.zero_grad()
            timed(f"backward, {name}", L.backward)
        timed("clip", torch.nn.utils.clip_grad_norm_, list(net.parameters()), 0.5)
        timed("RMSProp", learner.optimizer.step, torch.tensor(True))
    print(f"| part | ms, {torch.get_num_threads()} threads |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {median_ms(values):.1f} |")


def games(groups):
    """Environments in so many groups, started; with the slice of each."""
    size = N // groups
    seeds = script.seeds(1, 0, "training", N)
    made = [(script.Atari(ARGS, size), slice(i * size, (i + 1) * size)) for i in range(groups)]
    for envs, which in made:
        envs.reset(seeds[which])
    return made


def iteration(learner, made):
    """A rollout and an update, as train() makes them; each group is sent off by itself."""
    def receive(t, envs, which):
        s, reward, terminated, truncated, _ = envs.recv()
        learner.obs[t + 1, which] = torch.from_numpy(s)
        facts = np.stack([np.sign(reward), terminated, truncated]).astype(np.float32)
        learner.facts[:, t, which] = torch.from_numpy(facts)

    learner.obs[0] = learner.obs[T]
    kept = [[None] * len(made) for _ in range(T)]
    for t in range(T):
        for i, (envs, which) in enumerate(made):
            if t:
                receive(t - 1, envs, which)
            learner.act(t, which)
            kept[t][i] = learner.kept[t]
            envs.send(learner.actions[t, which].numpy())
    for envs, which in made:
        receive(T - 1, envs, which)
    log_pi, V = learner.net(learner.obs[:T], sum(kept, []))
    learner.step(learner.loss(log_pi, V, learner.V_n()))


def groups():
    """Wall and CPU time of an iteration, with one group of environments and with two."""
    contestants = {f"{count} x {N // count}": (Learner(4), games(count)) for count in (1, 2)}
    wall, cpu = ({name: [] for name in contestants} for _ in "12")
    for _ in range(WARM + ROUNDS):
        for name, contestant in contestants.items():
            start, used = time.perf_counter(), time.process_time()
            iteration(*contestant)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    print(f"| environments | ms, {torch.get_num_threads()} threads | CPU ms |\n|---|---|---|")
    for name in contestants:
        print(f"| {name} | {median_ms(wall[name]):.1f} | {median_ms(cpu[name]):.1f} |")


def shares():
    """CPU time of whole iterations by operation, on one thread; the emulator's is what is left."""
    torch.set_num_threads(1)
    contestant = Learner(4), games(1)
    for _ in range(WARM):
        iteration(*contestant)
    used, mine = time.process_time(), time.thread_time()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(ROUNDS):
            iteration(*contestant)
    used, mine = time.process_time() - used, time.thread_time() - mine
    names = {"convolutions and layers": ("conv", "addmm", "::mm"),
             "relu, forward and back": ("relu", "clamp_min", "threshold"),
             "copies, pictures to floats": ("copy_", "::cat", "div_", "fill_"),
             "RMSProp and clipping": ("lerp", "nan_to_num", "rsqrt", "::mul", "sub_", "::add",
                                      "norm")}
    seconds = dict.fromkeys(names, 0.0)
    for event in profile.key_averages():
        for name, parts_of in names.items():
            if any(part in event.key for part in parts_of):
                seconds[name] += event.self_cpu_time_total / 1e6
                break
    rows = {"emulator's threads": used - mine, **seconds}
    rows["all else"] = used - sum(rows.values())
    print("| CPU time | ms per update | share |\n|---|---|---|")
    for name, total in rows.items():
        print(f"| {name} | {1000 * total / ROUNDS:.1f} | {total / used:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["parts", "shares", "groups"])
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    {"parts": parts, "shares": shares, "groups": groups}[given.what]()
