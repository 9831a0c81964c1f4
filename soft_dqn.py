"""Soft Q-learning against standard DQN: the backup is a log-sum-exp in place of the maximum.

Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
         arXiv:1704.06440, sections 3.5 and 6.2, Figure 2. Equations 29, 30, 39, 44-46, 81-83;
         46, 82 and 83 are misprinted in the text and stand here corrected.
Train:   python soft_dqn.py --env-id ALE/Pong-v5
Arms:    the six of Figure 2: --backup hard, alone and with --n-step 5, and --backup soft-entropy
         and --backup soft-kl, each with --tau 0.1 and --tau 0.01
Resume:  python soft_dqn.py --resume runs/Pong__soft_dqn__seed1__20260101-120000
Score:   python soft_dqn.py --evaluate runs/Pong__soft_dqn__seed1__20260101-120000
Expect:  Pong about 20, as published for DQN; README.md has what was measured with this file.

Shapes:  B transitions a minibatch, n steps each, from N environments; A actions, C slots a ring.
Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature,
         V_Q(s) the soft maximum of Q(s, .), y_t the target of Q(s_t, a_t), pi the Boltzmann policy.
"""
import csv
import dataclasses
import difflib
import errno
import fcntl
import importlib.util
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from contextlib import closing, redirect_stderr, suppress
from pathlib import Path
from typing import Literal, NamedTuple, get_args

# === shared: waiting threads ===
# Before torch is imported. By default its idle threads spin, which takes the cores from the
# emulator and from other programs: on a busy machine a run then nearly stands still.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# === end shared ===

import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn


# === the paper ===
class Batch(NamedTuple):
    """B stored transitions with the n - 1 steps that followed each of them."""

    obs: torch.Tensor  # (B, 4, 84, 84) uint8, s_t
    a: torch.Tensor  # (B,) int64, a_t
    r: torch.Tensor  # (n, B) r_t .. r_{t+n-1}, clipped to -1, 0, 1
    terminated: torch.Tensor  # (n, B) 1 where a life or the game was lost: nothing follows, else 0
    truncated: torch.Tensor  # (n, B) 1 where the game was cut after that step, else 0
    next_obs: torch.Tensor  # (n, B, 4, 84, 84) s_{t+1} .. s_{t+n}; arbitrary once the game is over
    weight: torch.Tensor  # (B,) 0 where the drawn slot starts no transition, else 1


def soft_value(Q, log_pi_bar, tau):
    """V_Q(s) = tau log sum_a pi_bar(a|s) exp(Q(s, a) / tau), Eq. 29; (..., A) -> (...).

    Eq. 82 has log_pi_bar = -log A (KL), Eq. 83 has 0 (entropy), and tau = 0 is their common limit,
    the maximum of Eq. 81. Both are printed without the tau before the logarithm, and so diverge.
    """
    top = Q.max(-1).values
    if tau == 0:
        return top  # Eq. 81
    return top + tau * ((Q - top.unsqueeze(-1)) / tau + log_pi_bar).logsumexp(-1)  # Eq. 82, 83


def boltzmann(Q, log_pi_bar, tau):
    """log pi(a|s) = log pi_bar + (Q - V_Q) / tau, Eq. 30; normalised however large Q / tau is."""
    return ((Q - Q.max(-1, keepdim=True).values) / tau + log_pi_bar).log_softmax(-1)


def kl_divergence(log_pi, log_pi_bar):
    """KL[pi || pi_bar](s), (..., A) -> (...). With log_pi_bar = 0 it is minus the entropy of pi."""
    return (log_pi.exp() * (log_pi - log_pi_bar)).sum(-1)


def targets(r, terminated, truncated, Q, log_pi_bar, tau, gamma):
    """y_t = r_t + sum_{0<d<n} gamma^d (r_{t+d} - tau KL_{t+d}) + gamma^n V_Q(s_{t+n}), Eq. 46.

    (n, B) -> (B,); Q (n, B, A) is the target network's at s_{t+1} .. s_{t+n}, KL_{t+d} that of its
    Boltzmann policy. s_t has none: Q(s_t, a_t) is what follows once a_t is chosen. n = 1 is Eq. 45.
    With tau = 0, where no KL is needed, Q may be (1, B, A): that of the last state of each sum.
    At a termination nothing follows; a cut game ends the sum early, with V_Q of its last state.

    n > 1 is biased off-policy: Eq. 46 is an expectation over a_{t+1} .. a_{t+n-1} drawn from that
    Boltzmann policy, and the memory holds those of older and more random ones. n = 1 is not biased:
    a_t is given, and V_Q sums over all actions after it.
    """
    V = soft_value(Q, log_pi_bar, tau).expand_as(r)  # (n, B)
    KL = kl_divergence(boltzmann(Q, log_pi_bar, tau), log_pi_bar) if tau else torch.zeros_like(V)
    y = V[-1]  # gamma^n is printed gamma^{t+n}
    for d in reversed(range(len(r))):
        y = torch.where(truncated[d] > 0, V[d], y)
        y = r[d] + gamma * (1 - terminated[d]) * y
        y = y - tau * KL[d - 1] if d > 0 else y  # Q[d - 1] belongs to s_{t+d}
    return y


def loss(Q, a, y, weight, kind):
    """Eq. 44, or Huber's loss as the authors' DQN: the same up to an error of 1, linear beyond."""
    Q_a = Q.gather(-1, a.unsqueeze(-1)).squeeze(-1)  # (B,) Q(s_t, a_t)
    square = 0.5 * (Q_a - y).square()  # Eq. 44
    each = square if kind == "square" else nn.functional.huber_loss(Q_a, y, reduction="none")
    return (weight * each).sum() / weight.sum().clamp(min=1)


def epsilon_greedy(Q, epsilon, generator):
    """The best action, or with probability epsilon any; (N, A) -> (N,) int64."""
    uniform = torch.randint(Q.shape[-1], Q.shape[:-1], generator=generator, device=Q.device)
    u = torch.rand(Q.shape[:-1], generator=generator, device=Q.device)
    return torch.where(u < epsilon, uniform, Q.argmax(-1))


def boltzmann_sample(Q, tau, generator):
    """a ~ pi of Eq. 30, by the Gumbel-max rule; (N, A) -> (N,) int64."""
    return (boltzmann(Q, 0.0, tau) + gumbel_noise(Q.shape, generator)).argmax(-1)


# === flags ===
@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 10_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until epsilon is 0.01; 0: total-timesteps
    backup: Literal["hard", "soft-entropy", "soft-kl"] = "soft-entropy"  # Eq. 81, 83 or 82
    tau: float = 0.1  # temperature of the soft backup, in units of clipped reward
    n_step: int = 1  # rewards before the bootstrap (n); above 1 biased off-policy
    exploration: Literal["epsilon-greedy", "boltzmann"] = "epsilon-greedy"  # how training acts
    eval_epsilon: float = 0.01  # epsilon of evaluations
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 8  # environments stepped together (N)
    buffer_size: int = 1_000_000  # frames the replay memory holds, 7 kB each, all environments
    learning_starts: int = 50_000  # agent steps before the first update
    batch_size: int = 32  # transitions per update (B)
    train_frequency: int = 4  # agent steps per update, whatever num-envs is
    target_network_frequency: int = 40_000  # agent steps between copies to the target network
    learning_rate: float = 1e-4  # Adam step size
    loss: Literal["huber", "square"] = "huber"  # square is Eq. 44
    max_grad_norm: float = 10.0  # largest norm of the gradient of each weight and bias by itself
    save_replay: bool = False  # saves hold the memory; without, a resumed run plays to refill it
    # === shared: run flags ===
    seed: int = 1  # network, sampling noise and environments derive from it
    sticky: float = 0.0  # probability that the emulator repeats the last action
    max_episode_frames: int = 108_000  # time limit of a game, emulator frames
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is a GPU
    threads: int = 0  # CPU threads of PyTorch and of the emulator; 0: their own choice
    fast: bool = True  # CUDA graphs on a GPU, A2C also without a second pass; --no-fast: plainly
    log_every: int = 10_000  # agent steps per row of metrics.csv
    eval_every: int = 1_000_000  # agent steps between evaluations; 0: only at the end
    eval_episodes: int = 20  # full games per evaluation; 0: none
    checkpoint_every: int = 2_000_000  # agent steps between saves that restart the games; 0: none
    save_minutes: float = 10.0  # wall time between saves that leave the games alone; 0: none
    resume: str = ""  # run folder or checkpoint to go on from, with the flags it was started with
    evaluate: str = ""  # run folder or checkpoint to play --eval-episodes games with, no training
    runs_dir: str = "runs"  # where a new run makes its folder
    tensorboard: bool = False  # mirror metrics.csv and eval.csv (needs the package tensorboard)
    # === end shared ===


LIMITS = dict(total_timesteps=(1, 1e12), schedule_timesteps=(0, 1e12), tau=(0, 1e6), gamma=(0, 1),
              n_step=(1, 1000), eval_epsilon=(0, 1), num_envs=(1, 1024), buffer_size=(1, 1e9),
              learning_starts=(1, 1e12), batch_size=(1, 1e6), train_frequency=(1, 1e9),
              target_network_frequency=(1, 1e12), learning_rate=(0, 1e6),
              max_grad_norm=(1e-12, 1e12))
TERMS = ("loss", "max_Q", "V_Q", "entropy", "grad_norm")  # means over updates, in metrics.csv


# === algorithm ===
def train(args):
    """Trains until args.total_timesteps, or with args.evaluate only evaluates; returns statistics.

    Raises Refused on flags that make no sense or a checkpoint that does not fit, FloatingPointError
    if losses are not finite, OSError if the last save fails, SystemExit after it on a signal.
    """
    check_flags(args)
    with closing(Run(args, LIMITS)) as run:
        args, device, N = run.args, run.device, run.args.num_envs
        envs = Atari(args, N)
        A = envs.n_actions
        net, target = (QNetwork(A).to(device, memory_format=torch.channels_last) for _ in "12")
        target.load_state_dict(net.state_dict())
        optimizer = AdamTF(net.parameters(), args.learning_rate)
        noise = torch.Generator(device)
        tau = 0.0 if args.backup == "hard" else args.tau  # with log_pi_bar decides on the backup
        constant = -math.log(A) if args.backup == "soft-kl" else 0.0
        log_pi_bar = torch.full((A,), constant, device=device)

        @torch.no_grad()
        def act(obs, generator):  # (N, 4, 84, 84) -> (N,)
            return epsilon_greedy(net(obs), args.eval_epsilon, generator)

        evaluated = f"epsilon-greedy {args.eval_epsilon:g}"
        parts = dict(net=net, target=target, optimizer=optimizer)
        if args.evaluate:
            run.restore(**parts)
            return run.evaluate(act, evaluated)
        memory = Replay(N, capacity(args), device, run.folder if args.save_replay else None)
        run.restore(**parts, memory=memory)
        u = torch.zeros(args.batch_size, dtype=torch.float64, device=device)

        @torch.no_grad()
        def Q_now():
            return net(memory.obs)  # (N, A)

        def explore():  # (N,)
            if args.exploration == "boltzmann":
                return boltzmann_sample(Q_now(), args.tau, noise)
            return epsilon_greedy(Q_now(), epsilon_at(run.step, args), noise)

        def update():
            # targets and loss
            batch = memory.sample(u, args.n_step)
            next_obs = batch.next_obs if tau else last_obs(batch)
            with torch.no_grad():
                y = targets(batch.r, batch.terminated, batch.truncated, target(next_obs),
                            log_pi_bar, tau, args.gamma)
            Q = net(batch.obs)  # (B, A)
            L = loss(Q, batch.a, y, batch.weight, args.loss)

            # step
            optimizer.zero_grad()
            L.backward()
            norm = clip_each_(net.parameters(), args.max_grad_norm)
            optimizer.step(torch.isfinite(L) & torch.isfinite(norm))
            return dict(zip(TERMS, (L, *statistics(Q.detach(), log_pi_bar, tau, args.tau), norm)))

        Q_now = captured(Q_now, args, device)
        update = captured(update, args, device, net, optimizer)
        store = tuple(captured(fn, args, device) for fn in memory.store)
        if 0 < run.step < args.total_timesteps and not args.save_replay:
            refill(memory, envs, explore, noise, run, store)
        memory.begin(envs.reset(seeds(args.seed, run.step, "training", N)))

        while run.goes_on(act, evaluated):
            # act: the emulator works while the network learns from what it gave before
            noise.manual_seed(int(seeds(args.seed, run.step, "noise", 1)[0]))  # no state to save
            a = explore()
            envs.send(a.cpu().numpy())

            # targets, loss, step
            for _ in range(updates_by(run.step + N, args) - updates_by(run.step, args)):
                torch.rand(u.shape, generator=noise, out=u)
                run.count(update())
            copies = args.target_network_frequency
            if (run.step + N) // copies > run.step // copies:
                target.load_state_dict(net.state_dict())

            # store
            received = envs.recv()
            memory.add(a, *received, envs.ended, store)
            run.count_games(envs.ended)
            run.step += N

            # log, save
            if run.due("log"):
                row = run.means() if run.updates else dict.fromkeys(TERMS, math.nan)
                epsilon = epsilon_at(run.step, args) if args.exploration != "boltzmann" else 0.0
                run.log(dict(row, epsilon=epsilon, updates=updates_by(run.step, args),
                             replay_fill=memory.fill()))
            if run.due("checkpoint"):  # new games, so that a resumed run equals an unbroken one
                run.save(restarts=True)
                memory.begin(envs.reset(seeds(args.seed, run.step, "training", N)))
        return run.finish()


def updates_by(step, args):
    """Updates due by an agent step, so that their ratio to steps does not depend on num_envs."""
    first = args.learning_starts // args.train_frequency
    return max(0, step // args.train_frequency - first)


def epsilon_at(step, args):
    """Linear from 1 to 0.1 in a tenth of the schedule, from there to 0.01 at its end."""
    horizon = args.schedule_timesteps
    return float(np.interp(step, (0, horizon / 10, horizon), (1.0, 0.1, 0.01)))


def last_obs(batch):
    """The states in which the n-step sums end, (1, B, 4, 84, 84): all that a maximum needs of n."""
    going = 1 - torch.maximum(batch.terminated, batch.truncated)
    last = going.cumprod(0).sum(0).long().clamp(max=len(going) - 1)  # (B,) steps before the end
    return batch.next_obs[last, torch.arange(len(last), device=last.device)].unsqueeze(0)


def refill(memory, envs, explore, noise, run, store):
    """Plays for a resumed run what learning needs to go on; counted in neither steps nor scores."""
    N, began = run.args.num_envs, time.monotonic()
    steps = math.ceil(min(run.step, run.args.learning_starts) / N) * N
    say(f"refills the replay memory with {steps:,} steps, which do not count")
    drawn = seeds(run.args.seed, run.step, "refill", N + 1)
    noise.manual_seed(int(drawn[-1]))
    memory.begin(envs.reset(drawn[:-1]))
    for _ in range(steps // N):
        a = explore()
        received = envs.step(a.cpu().numpy())
        memory.add(a, *received, envs.ended, store)
        if run.signal:
            run.stop()
    run.row_at += time.monotonic() - began  # steps per second are those of training


def statistics(Q, log_pi_bar, tau, temperature):
    """Means over a batch: max Q, V_Q, and the entropy of the Boltzmann policy at --tau."""
    log_pi = boltzmann(Q, 0.0, max(temperature, 1e-6))  # tau may be 0 with --backup hard
    return (Q.max(-1).values.mean(), soft_value(Q, log_pi_bar, tau).mean(),
            -kl_divergence(log_pi, 0.0).mean())


def gumbel_noise(shape, generator):
    """Standard Gumbel noise on the generator's device."""
    noise = torch.empty(shape, device=generator.device)
    return -noise.exponential_(generator=generator).log()


def check_flags(args):
    """Raises Refused where flags do not go together, or the memory does not fit."""
    check(args, LIMITS | RUN_LIMITS)
    if args.tau < 1e-6 and args.backup != "hard":
        raise Refused(f"--tau {args.tau:g}: --backup {args.backup} divides by it; use --backup "
                      "hard, its limit at 0, or at least 1e-6")
    if args.tau < 1e-6 and args.exploration == "boltzmann":
        raise Refused(f"--tau {args.tau:g}: --exploration boltzmann divides by it; use "
                      "--exploration epsilon-greedy, with --backup hard if tau is to be 0")
    for name, steps in (("learning_starts", args.n_step + 1), ("buffer_size", args.n_step + 5)):
        if (value := getattr(args, name)) < (least := steps * args.num_envs):
            raise Refused(f"--{name.replace('_', '-')} {value} is too small for --num-envs "
                          f"{args.num_envs} with --n-step {args.n_step}: the least is {least}")
    if args.learning_starts >= args.total_timesteps and not args.evaluate:
        say(f"warning: nothing is learnt before --learning-starts {args.learning_starts:,}")
    check_memory(args, f"--buffer-size {args.buffer_size}: the replay memory",
                 args.num_envs * capacity(args) * SLOT_BYTES)
    check_memory(args, f"--batch-size {args.batch_size} with --n-step {args.n_step}",
                 args.batch_size * args.n_step * SAMPLE_BYTES)


def capacity(args):
    """Slots of each environment's ring (C)."""
    return math.ceil(args.buffer_size / args.num_envs)


# === network and optimizer ===
OBS_SHAPE = (4, 84, 84)  # four frames, oldest first


class QNetwork(nn.Module):
    """Q(s, .) on the trunk of Mnih et al. (2015), no padding: 3136 features.

    The authors' DQN pads its convolutions (7744 features). Mnih et al. do not, nor does the
    authors' A2C: so both sides of the paper's comparison have one trunk here, and the larger layer
    would cost more than twice the weights. Xavier-uniform weights and zero biases are theirs.
    """

    def __init__(self, n_actions):
        super().__init__()
        self.Q = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, n_actions),
        )
        for layer in self.Q:
            if hasattr(layer, "weight"):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, obs):
        """obs (..., 4, 84, 84) uint8 -> Q(s, .) (..., A)."""
        # uint8 until here: a quarter of the memory and of the copies. Stacking along a last axis is
        # channels-last in half the time of .to(memory_format=...).
        x = torch.stack(obs.flatten(end_dim=-4).unbind(1), -1).permute(0, 3, 1, 2)
        return self.Q(x.float().div_(255)).view(*obs.shape[:-3], -1)


class AdamTF(torch.optim.Adam):
    """Adam as TensorFlow 1 computed it: epsilon is added to the root before its bias is corrected.

    With torch.optim.Adam, which adds it after, the same epsilon would shorten early updates less:
    at update t it weighs there sqrt(1 - beta2^t) times what it does here, 1/30 of it at the first.
    Here its fused kernel, one pass over the memory in place of ten, is left to believe that it has
    made 1e9 updates, when nothing is left to correct; the corrections are in the learning rate.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-4):
        params = list(params)
        device = params[0].device
        super().__init__(params, torch.zeros((), device=device), betas, eps, fused=True,
                         capturable=device.type == "cuda")
        t = torch.zeros((), dtype=torch.float64, device=device)
        self.param_groups[0].update(alpha=lr, t=t)
        for p in params:  # made here, as a CUDA graph finds its tensors where they were before
            step = torch.full((), 1e9, dtype=torch.float32, device=device)
            self.state[p].update(step=step, exp_avg=torch.zeros_like(p),
                                 exp_avg_sq=torch.zeros_like(p))

    @torch.no_grad()
    def step(self, finite):
        """One update, or none where finite, a () bool tensor, is False: the host need not look."""
        group = self.param_groups[0]
        (beta1, beta2), t = group["betas"], group["t"].add_(finite)
        size = group["alpha"] * (1 - beta2**t).sqrt() / (1 - beta1**t)
        group["lr"].copy_(torch.where(finite, size, 0.0))
        self.grad_scale, self.found_inf = None, 1 - finite.float()  # the kernel then does nothing
        super().step()


def clip_each_(params, max_norm):
    """Clips the gradient of each tensor by its own norm; returns the norm of all before that."""
    norms = []
    for p in params:
        norms.append(p.grad.norm())
        p.grad.mul_(max_norm / norms[-1].clamp(min=max_norm))
    return torch.stack(norms).norm()


# === shared: fast path ===
def captured(fn, args, device, *changed):
    """fn as it is, or with --fast on a GPU as CUDA graphs, one for each argument it is called with.

    A graph is one launch in place of hundreds, which at this size take longer than the work itself.
    fn works on tensors that stay where they are, never looks at a value, and returns nothing or a
    dict or a tensor, which the next call overwrites. Before a capture it runs three times, on the
    stream that will capture: libraries set themselves up in their first calls, which may not happen
    in a capture. The networks and optimizers that fn changes are then put back; they must be named
    in changed. Whatever else it writes has to come out the same however often it runs.
    """
    if not args.fast or device.type != "cuda":
        return fn
    state = [x for part in changed for x in tensors_of(part.state_dict())]
    graphs, stream, pool = {}, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def capture(*key):
        before = [x.clone() for x in state]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                fn(*key)
        torch.cuda.current_stream(device).wait_stream(stream)
        for x, old in zip(state, before):
            x.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = fn(*key)
        if isinstance(result, dict):  # without what autograd keeps for them
            result = {name: x.detach() for name, x in result.items()}
        return graph, result

    def replay(*key):
        if key not in graphs:
            graphs[key] = capture(*key)
        graph, result = graphs[key]
        graph.replay()
        return result

    return replay


def tensors_of(tree):
    """The tensors in nested dicts and lists, themselves and not copies."""
    if isinstance(tree, (dict, list, tuple)):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [x for branch in branches for x in tensors_of(branch)]
    return [tree.detach()] if isinstance(tree, torch.Tensor) else []


class Pinned:
    """Fills a tensor from host arrays; on a GPU from pinned memory, so that the host goes on."""

    def __init__(self, tensor):
        self.target, self.staging, self.sent = tensor, None, None
        if tensor.is_cuda:
            self.staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.sent = torch.cuda.Event()

    def send(self, i, array):
        """tensor[i] = array"""
        if self.staging is None:
            self.target[i] = torch.from_numpy(array)
            return
        self.sent.synchronize()  # what was sent before has left the pinned memory
        self.staging[i] = torch.from_numpy(array)
        self.target[i].copy_(self.staging[i], non_blocking=True)
        self.sent.record()
# === end shared ===


# === replay memory ===
SLOT_BYTES = 84 * 84 + 5  # a frame and five facts


class Replay:
    """The last C slots of each of N environments, each frame once; stacks are made when sampled.

    Slot k of an environment lies at k % C. It holds the newest frame of an observation and what was
    done there. The newest slot is open: its frame is there, its action not yet. After a cut game
    comes one slot more than it had steps, with the frame of its last state: `last` is 1 there, and
    no transition starts from it. Environments therefore need not have written equally many slots.
    Every tensor is allocated here and none changes its shape or place, as a CUDA graph demands.
    """

    def __init__(self, num_envs, capacity, device, folder=None):
        self.C, self.device, self.folder = capacity, device, folder
        facts = {name: torch.zeros((num_envs, capacity), dtype=torch.uint8, device=device)
                 for name in ("a", "terminated", "last", "age")}
        self.frame = torch.empty((num_envs, capacity, 84, 84), dtype=torch.uint8, device=device)
        self.r = torch.zeros((num_envs, capacity), dtype=torch.int8, device=device)
        self.a, self.terminated, self.last, self.age = facts.values()  # age: frames before, max 3
        self.head = torch.zeros(num_envs, dtype=torch.int64, device=device)  # slots opened so far
        self.envs = torch.arange(num_envs, device=device)
        self.back = torch.tensor([3, 2, 1, 0], device=device)  # the frames of a stack
        self.obs = torch.zeros((num_envs, *OBS_SHAPE), dtype=torch.uint8, device=device)  # now
        self.action = torch.zeros_like(self.head)
        self.outcome = torch.zeros((3, num_envs), dtype=torch.int8, device=device)
        self.screens, self.outcomes = Pinned(self.obs), Pinned(self.outcome)
        self.segments, self.saved = [], [0] * num_envs  # files, and head when the last was written
        if folder:
            most, free = 3 * num_envs * capacity * SLOT_BYTES, shutil.disk_usage(folder).free
            say(f"--save-replay needs up to {most / 2**30:.2f} GiB in {folder}, "
                f"{free / 2**30:.2f} GiB are free")

    def open(self, i, frame, first):
        """Opens the next slot of environments i with (len(i), 84, 84) frames."""
        self.head[i] += 1
        self.write(i, frame, first)

    def write(self, i, frame, first):
        """Writes what the newest slot of environments i is opened with."""
        before, at = ((i, (self.head[i] - back) % self.C) for back in (2, 1))
        age = torch.where(first, 0, (self.age[before] + 1).clamp(max=3))
        self.frame[at], self.age[at], self.last[at] = frame, age, torch.zeros_like(age)

    def begin(self, s):
        """New games in all environments, (N, 4, 84, 84); those that were running count as cut."""
        self.screens.send(slice(None), s)
        self.last[self.envs, (self.head - 1) % self.C] = (self.head > 0).to(torch.uint8)
        self.open(self.envs, self.obs[:, 3], torch.ones_like(self.head, dtype=torch.bool))
        return self.obs

    def add(self, a, s, reward, terminated, truncated, final_s, ended, store=None):
        """Stores a step: the actions (N,), then what Atari.recv and .ended say. Returns obs.

        store: the functions self.store, possibly captured.
        """
        complete, write_new = store or self.store
        first = np.isin(np.arange(len(s)), [game[0] for game in ended])
        self.outcomes.send(slice(None), np.stack([np.sign(reward), terminated, first]))
        self.screens.send(slice(None), s)
        self.action.copy_(a)
        complete()
        if truncated.any():  # rare; s already is the next game's, final_s the cut game's
            i = torch.from_numpy(np.flatnonzero(truncated)).to(self.device)
            frame = torch.from_numpy(final_s[truncated, 3]).to(self.device)
            self.open(i, frame, torch.zeros_like(i, dtype=torch.bool))
            self.last[i, (self.head[i] - 1) % self.C] = 1
        self.head += 1
        write_new()
        return self.obs

    @property
    def store(self):
        """What add() does on the device in every step, in two parts that do no harm if repeated."""
        return self.complete, self.write_new

    def complete(self):
        """Completes the open slots with what was done there and what came of it."""
        at = self.envs, (self.head - 1) % self.C
        self.a[at], self.r[at] = self.action.to(torch.uint8), self.outcome[0]
        self.terminated[at] = self.outcome[1].to(torch.uint8)

    def write_new(self):
        """Writes the newest frames to the slots that were opened for them."""
        self.write(self.envs, self.obs[:, 3], self.outcome[2].bool())

    def sample(self, u, n):
        """The transitions that (B,) uniform numbers in [0, 1) pick: each equally likely.

        Slots that start none have weight 0: the shapes do not depend on how many there are.
        """
        fill = self.head.clamp(max=self.C)  # (N,)
        starts = (fill - n).clamp(min=0)  # (N,) slots with n more behind them
        until = starts.cumsum(0)
        j = (u * until[-1]).long()  # (B,) among those of all environments
        i = torch.searchsorted(until, j, right=True)  # (B,) environment
        older = j - (until - starts)[i]  # (B,) slots before it in the ring
        k = (self.head - fill)[i] + older + torch.arange(n + 1, device=j.device)[:, None]
        at = i, k % self.C  # (n+1, B) the slots of s_t .. s_{t+n}
        frames = i[:, None] * self.C + (k[..., None] - self.back) % self.C  # (n+1, B, 4)
        # in one row of all environments: indexing with two tensors takes 20 times as long on a CPU
        stack = self.frame.flatten(end_dim=1).index_select(0, frames.flatten())
        seen = self.back <= self.age[at][..., None]  # before a game's first frame all is zero
        obs = stack.view(*frames.shape, 84, 84) * seen[..., None, None]  # (n+1, B, 4, 84, 84)
        begun = (self.last[at][0] == 0) & (self.age[at][0] <= older)  # its oldest frame not lost
        r, terminated, last = (x[at].float() for x in (self.r, self.terminated, self.last))
        return Batch(obs[0], self.a[at][0].long(), r[:-1], terminated[:-1], last[1:], obs[1:],
                     begun.float())

    def fill(self):
        """The part of the memory that is in use."""
        return (self.head.clamp(max=self.C).float().mean() / self.C).item()

    # With --save-replay each save writes the slots that are new since the last one to a file of
    # their own, a segment. The checkpoint lists the segments it needs. Those that it does not need
    # are deleted once it is sure to be in place; if it could not be written, the new one is.
    def state_dict(self):
        """Writes a segment; returns what the checkpoint says of the memory."""
        if not self.folder:
            return {}
        head = self.head.tolist()
        # from the slot that was open then, which has been completed since
        first = [max(0, saved - 1, end - self.C) for saved, end in zip(self.saved, head)]
        number = self.segments[-1]["number"] + 1 if self.segments else 0
        segment, crc = dict(number=number, first=first, end=head), 0
        with open(self.path(segment), "wb") as f:
            for x in self.pieces(segment):
                data = x.cpu().numpy()
                f.write(data)
                crc = zlib.crc32(data, crc)
            f.flush()
            os.fsync(f.fileno())
            segment |= dict(size=f.tell(), crc=crc)
        needed = [old for old in self.segments
                  if any(end > now - self.C for end, now in zip(old["end"], head))]
        self.written = [*needed, segment], head
        return dict(head=head, segments=self.written[0])

    def settle(self, saved):
        """Deletes the segments that the checkpoint in place, with saved the new one, lists not."""
        if self.folder:
            self.segments, self.saved = self.written if saved else (self.segments, self.saved)
            for path in set(self.folder.glob("replay-*.bin")) - {*map(self.path, self.segments)}:
                with suppress(OSError):
                    path.unlink()

    def load_state_dict(self, state):
        """Reads the segments that a checkpoint lists; Refused if one is not as it was written."""
        if not self.folder:
            return
        for segment in state["segments"]:
            path, crc = self.path(segment), 0
            if not path.is_file() or path.stat().st_size != segment["size"]:
                raise Refused(f"{path} is missing or not as long as the checkpoint says")
            with open(path, "rb") as f:
                for x in self.pieces(segment):
                    data = np.frombuffer(f.read(x.numel()), np.uint8)
                    crc = zlib.crc32(data, crc)
                    x.copy_(torch.from_numpy(data.copy()).view(x.dtype).view(x.shape))
            if crc != segment["crc"]:
                raise Refused(f"{path} is damaged: its checksum is not that of the checkpoint")
        self.segments, self.saved = state["segments"], state["head"]
        self.head.copy_(torch.tensor(self.saved))

    def pieces(self, segment):
        """Yields the parts of all tensors that a segment holds, at most 4096 slots at a time."""
        for i, (k, end) in enumerate(zip(segment["first"], segment["end"])):
            while k < end:
                size = min(end - k, self.C - k % self.C, 4096)
                for x in (self.frame, self.a, self.r, self.terminated, self.last, self.age):
                    yield x[i, k % self.C:k % self.C + size]
                k += size

    def path(self, segment):
        return self.folder / f"replay-{segment['number']:06}.bin"


# === shared: environment ===
FRAME_SKIP = 4


def seeds(seed, step, purpose, n):
    """(n,) seeds for a user's seed, an agent step and a purpose. (seed + k would share most.)"""
    purpose = ("training", "evaluation", "noise", "evaluation noise", "refill").index(purpose)
    return np.random.SeedSequence([seed, step, purpose]).generate_state(n) % 2**31


class Atari:
    """Games of one kind, stepped together. A lost life ends the learner's episode, not the game.

    README.md, "The environment", says what each setting does and why it is so.
    """

    def __init__(self, args, num_envs):
        self.envs = gym.make_vec(
            args.env_id, num_envs=num_envs, vectorization_mode="vector_entry_point",
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP, num_threads=args.threads,
            max_num_frames_per_episode=args.max_episode_frames,
            repeat_action_probability=args.sticky,  # the emulator's own default is 0.25
            life_loss_info=True,  # episodic_life=True would restart the game at every lost life
            reward_clipping=False,  # the learner clips; here the true score would be lost
        )
        self.num_envs, self.n_actions = num_envs, int(self.envs.single_action_space.n)

    def reset(self, seeds):
        """Starts new games on (N,) seeds; returns obs (N, 4, 84, 84) uint8."""
        obs, info = self.envs.reset(seed=seeds)
        self.frame, self.score = info["episode_frame_number"], np.zeros(self.num_envs)
        self.length = np.zeros(self.num_envs, np.int64)
        return obs

    def step(self, actions):
        """Takes (N,) ints and returns what recv() does."""
        self.send(actions)
        return self.recv()

    def send(self, actions):
        """Starts a step, in threads of the emulator; recv() must follow.

        Raises ValueError on an unknown action: the emulator would hang for good.
        """
        if actions.min() < 0 or actions.max() >= self.n_actions:
            raise ValueError(f"actions {actions} are not all in 0..{self.n_actions - 1}")
        self.envs.send(actions)

    def recv(self):
        """Ends a step; returns obs, reward, terminated, truncated, final_obs (None if not any).

        Where a game ended, obs is the next one's first, and self.ended lists (index, score, length
        in agent steps, cut by the time limit). final_obs is valid where truncated, else garbage.
        """
        obs, reward, terminated, truncated, info = self.envs.recv()
        self.score, self.length = self.score + reward, self.length + 1
        frame = info["episode_frame_number"]  # goes on through a lost life, restarts with the game
        over, self.frame = truncated | (frame != self.frame + FRAME_SKIP), frame
        played = zip(range(self.num_envs), self.score, self.length, truncated)
        self.ended = [game for game in played if over[game[0]]]
        self.score[over], self.length[over] = 0, 0
        return obs, reward, terminated, truncated, info.get("final_obs")


def play_games(act, args, step, device, stopped=lambda: False):
    """Plays args.eval_episodes full games or a few more: every environment plays equally many.

    act(obs, generator) -> (N,) actions; seeds and noise are evaluation's own. Returns the games as
    (score, length, cut by the time limit), or None once stopped() is true.
    """
    if not args.eval_episodes:
        return []
    each = math.ceil(args.eval_episodes / args.num_envs)  # games per environment
    envs = Atari(args, math.ceil(args.eval_episodes / each))
    generator = torch.Generator(device)
    generator.manual_seed(int(seeds(args.seed, step, "evaluation noise", 1)[0]))
    obs = envs.reset(seeds(args.seed, step, "evaluation", envs.num_envs))
    games = [[] for _ in obs]
    while min(map(len, games)) < each:
        actions = act(torch.from_numpy(obs).to(device), generator)
        obs = envs.step(actions.cpu().numpy())[0]
        for i, *game in envs.ended:
            games[i].append(game)
        if stopped():
            return None
    return [game for played in games for game in played[:each]]
# === end shared ===


# === shared: run ===
FORMAT = 2  # of checkpoints
RUN_LIMITS = dict(seed=(0, 2**32 - 1), sticky=(0, 1), threads=(0, 4096), log_every=(1, 1e12),
                  eval_every=(0, 1e12), eval_episodes=(0, 1e6), checkpoint_every=(0, 1e12),
                  save_minutes=(0, 1e6), max_episode_frames=(FRAME_SKIP, 1e9))
NUMBERS = {int: "a whole number", float: "a number"}
SAMPLE_BYTES = 250_000  # at least, in a pass through the network: 4 screens, widest activations
FREE_ON_RESUME = {"total_timesteps", "device", "threads", "fast", "eval_every", "eval_episodes",
                  "eval_epsilon", "save_minutes", "resume", "evaluate", "runs_dir", "tensorboard"}
KEPT = ("step", "done_at", "games_cut", "games", "last100", "names", "sums", "first_bad",
        "updates")


class Refused(Exception):
    """What the user can put right, in one sentence; the command line prints it and exits with 2."""


def main(Args, train, description):
    """The command line; on --resume and --evaluate the flags not given are the checkpoint's."""
    try:
        description = re.sub(r"\n(?=\w)", "\n\n", description)  # or --help joins its lines
        args = parse(Args, description=description)
        if source := args.resume or args.evaluate:
            try:
                saved = Args(**read_checkpoint(source)["args"])
            except (Refused, OSError, TypeError) as e:
                flag = "--resume" if args.resume else "--evaluate"
                name = Path(__file__).name
                raise Refused(f"{flag} {source} is not a run of this {name}: {e}") from e
            args = parse(Args, description=description, default=saved)
        train(args)
    except KeyboardInterrupt:  # before there is a run to save, or a second time
        sys.exit(128 + signal.SIGINT)
    except (Refused, FloatingPointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2 if isinstance(e, Refused) else 1)


def parse(Args, **settings):
    """tyro.cli(Args), with one sentence as Refused where tyro has a box of several lines."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(Args, **settings)
    except SystemExit as e:
        if e.code and (mistake := mistake_in(sys.argv[1:], Args)):
            raise Refused(mistake) from None
        sys.stderr.write(box.getvalue())
        raise


def mistake_in(words, Args):
    """What is wrong with a command line that tyro refuses, or None if this cannot tell."""
    kinds = {f.name: f.type for f in dataclasses.fields(Args)}
    words = [x for word in words for x in word.split("=", 1 if word.startswith("--") else 0)]
    while words:
        flag = words.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        if kinds.get(name.removeprefix("no_")) is bool:
            if words and not words[0].startswith("-"):
                return f"{flag} {words[0]}: it takes no value; --no- before the name turns it off"
        elif name not in kinds or not flag.startswith("--"):
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f"perhaps you meant {flag_of(near[0])}" if near else "--help lists all of them"
            return f"{flag} is not a flag of {Path(__file__).name}; {hint}"
        elif not words or words[0] == "" and kinds[name] is not str:
            return f"{flag} has no value after it; it takes {allowed(name, kinds[name])}"
        elif not fits(value := words.pop(0), kinds[name]):
            return f"{flag} {value} is not {allowed(name, kinds[name])}"
    return None


def flag_of(name):
    return "--" + name.replace("_", "-")


def fits(word, kind):
    """Whether a word of the command line has the type, or is one of the choices, of a flag."""
    if get_args(kind):
        return any(fits(word, part) for part in get_args(kind))
    if kind not in NUMBERS:  # a choice, or str
        return kind in (word, str)
    try:
        kind(word)
    except ValueError:
        return False
    return True


def allowed(name, kind):
    """What a flag takes, in words."""
    if get_args(kind):
        return " or ".join(allowed(name, part) for part in get_args(kind))
    if kind not in NUMBERS:
        return "a text" if kind is str else kind
    low, high = (LIMITS | RUN_LIMITS)[name]
    return f"{NUMBERS[kind]} between {low:,.15g} and {high:,.15g}"


def check(args, limits):
    """Raises Refused on the first flag whose value makes no sense."""
    kinds = {f.name: f.type for f in dataclasses.fields(args)}
    for name, (low, high) in limits.items():
        if not low <= (value := getattr(args, name)) <= high:  # NaN fails this too
            raise Refused(f"{flag_of(name)} {value} is not {allowed(name, kinds[name])}")
    games = {k[4:-3].lower(): k for k in gym.registry if k.startswith("ALE/")}
    if args.env_id not in games.values():
        name = re.sub(r"(-ram|NoFrameskip|Deterministic)*-v\d+$", "", args.env_id.split("/")[-1])
        name = name.lower().replace("_", "")
        near = [name] if name in games else difflib.get_close_matches(name, games, 3)
        hint = " or ".join(games[k] for k in near) or "an id like ALE/Pong-v5"
        raise Refused(f"--env-id {args.env_id} is not a game of the emulator; try {hint}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise Refused("--tensorboard needs the package: pip install tensorboard")
    if args.evaluate and args.resume:
        raise Refused(f"--evaluate {args.evaluate} goes without --resume {args.resume}")
    if args.evaluate and not args.eval_episodes:
        raise Refused("--eval-episodes 0: --evaluate plays at least 1")
    if hasattr(args, "num_steps"):
        check_memory(args, f"--num-envs {args.num_envs} with --num-steps {args.num_steps}",
                     args.num_envs * args.num_steps * SAMPLE_BYTES)


def check_memory(args, what, size):
    """Raises Refused if training needs more bytes than there are."""
    cuda = args.device != "cpu" and torch.cuda.is_available()
    if not args.evaluate and size > (free := free_bytes(cuda)):
        raise Refused(f"{what} needs {size / 2**30:.2f} GiB {'of the GPU' if cuda else 'of memory'}"
                      f", {free / 2**30:.2f} GiB are free")


def free_bytes(cuda):
    """Memory that could be taken now."""
    if cuda:
        return torch.cuda.mem_get_info()[0]
    if Path("/proc/meminfo").exists():  # counts what the page cache would give back
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_checkpoint(path, device="cpu"):
    """The checkpoint at a path, or in the run folder there. Raises Refused if it is of no use."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise Refused(f"there is no checkpoint at {path}")
    try:  # weights_only: a downloaded checkpoint cannot run code
        saved = torch.load(path, map_location=device, weights_only=True)
        script, number, newer = saved["script"], saved["format"], saved["format"] > FORMAT
    except Exception as e:
        raise Refused(f"{path} cannot be read as a checkpoint ({type(e).__name__})") from e
    if script != Path(__file__).stem:
        raise Refused(f"{path} was made by {script}.py, this is {Path(__file__).name}")
    if number != FORMAT:
        raise Refused(f"{path} is from {'a newer' if newer else 'an older'} version of this script "
                      f"(format {number}, here {FORMAT}); use that, the run's folder has a copy")
    return dict(saved, path=path.resolve())


class Run:
    """One run: its folder, lock, logs, saves, evaluations and signals. close() it at the end.

    What cannot be written while it trains, on a full disk for example, does not end it: the last
    checkpoint stands, rows wait in memory, and both are tried again at the next row or save. Only
    if the last save fails, at the end or on a signal, is that an error.
    """

    def __init__(self, args, limits):
        check(args, limits | RUN_LIMITS)
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if args.device == "auto" else args.device)
        source, horizon = args.resume or args.evaluate, args.schedule_timesteps
        self.saved = read_checkpoint(source, self.device) if source else {}
        self.args = dataclasses.replace(args, schedule_timesteps=horizon or args.total_timesteps)
        self.step = self.updates = self.games_cut = self.signal = 0
        self.done_at = dict(log=0, eval=0, checkpoint=0)  # agent step of the last one
        self.last100, self.games = [], []  # (score, length) of 100 games, of those since the row
        self.names, self.sums, self.first_bad, self.result = [], None, None, {}
        self.folder = self.lock = self.board = None
        self.waiting = dict(metrics=[], eval=[])  # rows that are not on the disk yet
        if threads := args.threads or self.saved.get("threads"):
            torch.set_num_threads(threads)  # the number of threads decides how sums are rounded
        torch.manual_seed(args.seed)
        if not args.evaluate:
            self.open_folder()
        self.began = self.saved_at = time.monotonic()
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self.handlers[number] = signal.signal(number, self.on_signal)

    def close(self):
        self.release_signals()
        for file in filter(None, (self.board, self.lock)):
            file.close()

    def release_signals(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, _):
        """The first one is for goes_on(), after the update; one a second later acts at once."""
        if not self.signal:
            self.signal, self.signal_at = number, time.monotonic()
        elif time.monotonic() - self.signal_at > 1:  # `timeout` and terminals send theirs twice
            self.release_signals()
            signal.raise_signal(number)

    def open_folder(self):
        """Makes the run's folder, or reopens it and cuts its logs back to the checkpoint."""
        args, saved, script = self.args, self.saved, Path(__file__)
        for name, value in saved.get("args", {}).items():
            if name not in FREE_ON_RESUME and value != (given := getattr(args, name)):
                raise Refused(f"--{name.replace('_', '-')} {given}: the run to resume has {value}")
        if saved and args.total_timesteps < saved["step"]:
            raise Refused(f"--total-timesteps {args.total_timesteps}: it is at {saved['step']}")
        game, now = args.env_id.removeprefix("ALE/")[:-3], time.strftime("%Y%m%d-%H%M%S")
        folder = Path(args.runs_dir) / f"{game}__{script.stem}__seed{args.seed}__{now}"
        folder = saved["path"].parent if saved else folder
        while not saved and folder.exists():  # another run began in the same second
            folder = folder.with_name(folder.name + "b")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(folder / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            self.logs = {name: folder / f"{name}.csv" for name in self.waiting}
            sizes = saved["logs"] if saved else dict.fromkeys(self.logs, 0)
            for name, path in self.logs.items():
                if (path.stat().st_size if path.exists() else 0) < sizes[name]:
                    raise Refused(f"{path} is shorter than when the checkpoint was saved")
            about = f"args-resumed-at-{saved['step']}.json" if saved else "args.json"
            (folder / about).write_text(json.dumps(provenance(self.device, args), indent=1))
            if not saved:
                (folder / script.name).write_bytes(script.read_bytes())
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                purge = saved["step"] + 1 if saved else None
                self.board = SummaryWriter(folder / "tensorboard", purge_step=purge)
            for name, path in self.logs.items():
                with open(path, "ab") as f:
                    f.truncate(sizes[name])
        except BlockingIOError as e:
            raise Refused(f"another process is training in {folder}") from e
        except OSError as e:
            raise Refused(f"--runs-dir: cannot write to {folder} ({e.strerror})") from e
        self.folder = folder

    def restore(self, **parts):
        """Names what a save holds besides the run's own state, and loads all of it if resuming."""
        self.parts = parts
        try:
            for name, part in parts.items() if self.saved else ():
                part.load_state_dict(self.saved[name])
        except (KeyError, ValueError, RuntimeError) as e:
            raise Refused(f"{self.saved['path']} does not fit this script and game") from e
        vars(self).update((name, self.saved[name]) for name in KEPT if self.saved)
        self.done_at["checkpoint"] = self.step  # the games restart here
        self.row_step = self.line_step = self.step
        self.row_at = self.line_at = time.monotonic()
        if not self.folder:
            return
        args, verb = self.args, "resumes" if self.saved else "writes"
        say(f"{verb} {self.folder}, device {self.device}")
        if 0 < args.checkpoint_every < args.max_episode_frames // FRAME_SKIP * args.num_envs:
            say("warning: --checkpoint-every restarts games before one of full length could end")
        if args.total_timesteps > args.schedule_timesteps:
            say(f"warning: schedules end at --schedule-timesteps {args.schedule_timesteps:,}")

    def save(self, restarts=False, last=False):
        """Writes checkpoint.pt, whole or not at all; `restarts` says that all games now restart.

        If it cannot be written that is an OSError for the `last` save, else only a warning.
        """
        self.check_finite()
        running = self.step > self.done_at["checkpoint"]  # if resumed from here, games are cut
        games_cut = self.games_cut + self.args.num_envs * running
        if restarts:
            self.games_cut, self.done_at["checkpoint"] = games_cut, self.step
        state = dict(format=FORMAT, script=Path(__file__).stem, threads=torch.get_num_threads(),
                     args=vars(self.args) | dict(resume="", evaluate=""), wall=self.wall_time())
        state |= {name: getattr(self, name) for name in KEPT} | dict(games_cut=games_cut, logs={})
        new, failed = self.folder / "checkpoint.new", None
        try:
            self.write_rows()
            for name, path in self.logs.items():
                with open(path, "ab") as f:
                    os.fsync(f.fileno())  # on the disk before the checkpoint that counts on it
                    state["logs"][name] = f.tell()
            state |= {name: part.state_dict() for name, part in self.parts.items()}
            torch.save(state, data := io.BytesIO())  # to a file it hides what is wrong with that
            with open(new, "wb") as f:
                f.write(data.getbuffer())
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, self.folder / "checkpoint.pt")
            sync(self.folder)
        except OSError as e:
            failed = OSError(f"step {self.step} could not be saved in {self.folder} "
                             f"({e.strerror}); the last good checkpoint: {self.last_good()}")
            with suppress(OSError):
                new.unlink()
        for part in self.parts.values():
            if hasattr(part, "settle"):  # a part with files of its own
                part.settle(saved=not failed)
        if failed and last:
            raise failed
        if failed:
            say(f"warning: {failed}")
        self.saved_at = time.monotonic()

    def last_good(self):
        return next(self.folder.glob("checkpoint.pt"), "not yet made")

    def wall_time(self):
        return self.saved.get("wall", 0.0) + time.monotonic() - self.began

    def count_games(self, ended):
        """Counts the games that Atari.step found ended."""
        ended = [(float(score), int(length)) for _, score, length, _ in ended]
        self.games, self.last100 = self.games + ended, (self.last100 + ended)[-100:]

    def count(self, terms):
        """Counts an update and adds its terms to the row's sums; the host does not wait for it."""
        self.updates += 1
        values = torch.stack(list(terms.values())).detach().double()
        if self.updates == 1:
            self.names, self.sums, self.first_bad = list(terms), torch.zeros_like(values), values
        self.first_bad = torch.where(self.sums.isfinite().all(), values, self.first_bad)
        self.sums = self.sums + values

    def check_finite(self):
        """Raises FloatingPointError, with its terms, if an update since the row was not finite."""
        if self.updates and not self.sums.isfinite().all():
            terms = ", ".join(f"{k} {v:.4g}" for k, v in zip(self.names, self.first_bad.tolist()))
            raise FloatingPointError(f"an update by step {self.step} was not finite and left out "
                                     f"({terms}); the last good checkpoint: {self.last_good()}")

    def means(self):
        """The mean of each term over the updates since the last row, by name."""
        self.check_finite()
        return dict(zip(self.names, (self.sums / self.updates).tolist()))

    def due(self, what):
        """Whether a "log" row, "eval" or "checkpoint" is due; the first two also are at the end."""
        every, done_at = getattr(self.args, f"{what}_every"), self.done_at[what]
        last = what != "checkpoint" and self.step >= self.args.total_timesteps
        return self.step > done_at and (last or every and self.step // every > done_at // every)

    def log(self, terms):
        """Writes a row of metrics.csv: speed, games ended since the last row, then the terms."""
        now, last100 = time.monotonic(), summary(self.last100)
        row = dict(sps=(self.step - self.row_step) / (now - self.row_at), episodes=len(self.games))
        row |= summary(self.games) | {f"last100_{k}": v for k, v in last100.items()}
        self.write("metrics", row | dict(games_cut=self.games_cut) | terms)
        self.games, self.games_cut, self.updates = [], 0, 0
        self.row_step, self.row_at, self.done_at["log"] = self.step, now, self.step

    def evaluate(self, act, policy):
        """Plays --eval-episodes games with act, writes a row of eval.csv and returns it."""
        start = time.monotonic()
        games = play_games(act, self.args, self.step, self.device, lambda: self.signal)
        self.row_at += (taken := time.monotonic() - start)  # steps per second are those of training
        self.line_at += taken
        if self.signal:  # a run saves first and evaluates when it is resumed
            return {} if self.folder else sys.exit(128 + self.signal)
        self.done_at["eval"] = self.step
        if not games:
            return {}
        self.result = dict(policy=policy, episodes=len(games), **summary(games),
                           over_time_limit=sum(int(game[2]) for game in games))
        say("evaluation at step {:,}: score {score_mean:.1f} +- {score_std:.1f} over {episodes} "
            "games, {policy}".format(self.step, **self.result))
        if self.folder:
            self.write("eval", self.result)
        return self.result

    def write(self, log, row):
        row = dict(step=self.step, frames=self.step * FRAME_SKIP, wall_time=self.wall_time(), **row)
        self.waiting[log].append(row)
        try:
            self.write_rows()
        except OSError as e:
            if len(self.waiting[log]) == 1:  # say it once
                say(f"warning: {self.logs[log]}: {e.strerror}; its rows wait in memory")
        try:
            for key, value in row.items() if self.board else ():
                if not isinstance(value, str):
                    self.board.add_scalar(f"{log}/{key}", value, self.step)
            if self.board:
                self.board.flush()
        except OSError as e:  # its thread does not come back
            say(f"warning: TensorBoard gets no more rows: {e.strerror}")
            self.board = None

    def write_rows(self):
        """Appends the rows that wait to their logs, all of a log's or, with OSError, none."""
        for log, rows in self.waiting.items():
            with open(self.logs[log], "ab", buffering=0) as f:
                size, text = f.tell(), io.StringIO()
                writer = csv.writer(text)
                if rows and not size:
                    writer.writerow(rows[0])  # its keys
                for row in rows:
                    writer.writerow(f"{v:.9g}" if isinstance(v, float) else v for v in row.values())
                data = text.getvalue().encode()
                if f.write(data) < len(data):  # there was room for a part only
                    f.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rows.clear()

    def goes_on(self, act, policy):
        """Whether there is more to train. Evaluates if due, shows progress, saves by the clock.

        On a signal it saves and raises SystemExit.
        """
        if self.due("eval"):
            self.evaluate(act, policy)
        if self.signal:
            self.stop()
        now, terminal, total = time.monotonic(), sys.stdout.isatty(), self.args.total_timesteps
        if 0 < self.args.save_minutes * 60 < now - self.saved_at:
            self.save()
        if now - self.line_at > (0.5 if terminal else 5) and total > self.step > self.line_step:
            sps = (self.step - self.line_step) / (now - self.line_at)
            score, minutes = summary(self.last100)["score_mean"], (total - self.step) / sps / 60
            say(f"step {self.step:,} of {total:,} ({self.step / total:.1%}), score {score:.1f}, "
                f"{sps:.0f} steps/s, {minutes:.0f} min left", end="" if terminal else "\n")
            self.line_step, self.line_at = self.step, now
        return self.step < total

    def stop(self):
        """Saves and ends the process, as a signal asked for."""
        self.save(last=True)
        say(f"stopped at step {self.step:,}; go on with --resume {self.folder}")
        raise SystemExit(128 + self.signal)

    def finish(self):
        """The last save; returns the final statistics."""
        self.save(last=True)
        say(f"done: {self.folder}")
        result = {f"eval_{k}": v for k, v in self.result.items()}
        return dict(step=self.step, folder=str(self.folder), **summary(self.last100), **result)


def summary(games):
    """Statistics of games (score, length, ...), NaN if there are none."""
    score, length = np.array([game[:2] for game in games] or [(math.nan, math.nan)]).T
    stats = dict(score_mean=score.mean(), score_std=score.std(), score_median=np.median(score),
                 score_min=score.min(), score_max=score.max(), length_mean=length.mean())
    return {k: float(v) for k, v in stats.items()}


def sync(folder):
    """Puts on the disk that a file of the folder was renamed, where the file system can."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def say(text, end="\n"):
    try:
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError:  # `| head` has left, or the terminal is closed: the run goes on unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def provenance(device, args):
    """Flags, code, versions and hardware, so that a result can be traced to what made it."""
    git = [shutil.which("git") or "true", "-C", Path(__file__).resolve().parent]
    git = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = re.search(r"model name\s*: (.*)|$", cpu)[1] or platform.processor()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return dict(args=vars(args), command=sys.argv, time=time.ctime(), commit=git.stdout.strip(),
                python=platform.python_version(), platform=platform.platform(), cpu=cpu,
                cores=os.cpu_count(), threads=torch.get_num_threads(), gpu=gpu,
                **{m.__name__: m.__version__ for m in (torch, np, gym, ale_py)})
# === end shared ===


# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "gymnasium>=1.1", "ale-py>=0.12.1", "numpy>=1.26", "tyro>=0.9.1"]
# ///
if __name__ == "__main__":
    main(Args, train, __doc__)
