"""A2C with the proper entropy-regularised policy gradient: the regulariser is in the returns.

Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
         arXiv:1704.06440, section 6.1, the arm "EntRL" of Figure 1. Equations 36, 52-54, 80, 84-86;
         52, 54 and 80 are misprinted in the text and stand here corrected.
Train:   python a2c_proper.py --env-id ALE/Pong-v5 --total-timesteps 10000000
Resume:  python a2c_proper.py --resume runs/Pong__a2c_proper__seed1__20260101-120000
Score:   python a2c_proper.py --evaluate runs/Pong__a2c_proper__seed1__20260101-120000
Expect:  Pong 17 to 20 then, as published for A2C; README.md has what was measured with this file.

Shapes:  T steps of N environments, A actions. s_t is a stack of 4 frames, 84 x 84, uint8.
Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature,
         Delta_t the n-step advantage, V_hat_t the value target, c the weight of the value loss.
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
class Rollout(NamedTuple):
    """What n = T steps of N environments leave behind, as tensors on the device."""

    obs: torch.Tensor  # (T+1, N, 4, 84, 84) uint8, s_t; the last one is s_{t+n}
    a: torch.Tensor  # (T, N) int64, a_t ~ pi_theta(. | s_t)
    r: torch.Tensor  # (T, N) r_t, clipped to -1, 0, 1
    terminated: torch.Tensor  # (T, N) 1 where a life or the game was lost: nothing follows, else 0
    truncated: torch.Tensor  # (T, N) 1 where the time limit cut the game, else 0
    V_final: torch.Tensor  # (T, N) V(the last observation of the cut game) where truncated, else 0


def kl_divergence(log_pi, log_pi_bar):
    """KL[pi || pi_bar](s), (..., A) -> (...). With log_pi_bar = 0 it is minus the entropy of pi."""
    return (log_pi.exp() * (log_pi - log_pi_bar)).sum(-1)


def n_step_returns(r, terminated, truncated, V_final, V_n, gamma):
    """sum_d gamma^d r_{t+d} + gamma^n V(s_{t+n}) of Eq. 54 for any r; all (T, N), but V_n (N,).

    The sum ends where the game does; where the time limit cut it, V of its last state stands in.
    """
    R, returns = V_n, []
    for t in reversed(range(len(r))):
        R = torch.where(truncated[t] > 0, V_final[t], R)
        R = r[t] + gamma * (1 - terminated[t]) * R
        returns.append(R)
    return torch.stack(returns[::-1])


def losses(log_pi, V, rollout, V_n, log_pi_bar, tau, gamma, c):
    """L of Eq. 86, to minimise, and its terms by name; log_pi (T, N, A), V (T, N), V_n (N,).

    log_pi_bar (A,) or (): 0 pays the entropy of pi, -log A charges its KL from uniform. Between the
    two, r_t differs by the constant tau log A, which in games that end rewards staying alive.
    """
    _, a, r, terminated, truncated, V_final = rollout
    log_pi_a = log_pi.gather(-1, a.unsqueeze(-1)).squeeze(-1)  # (T, N) log pi(a_t | s_t)
    KL = kl_divergence(log_pi, log_pi_bar)  # (T, N) KL_t
    r = r - tau * KL  # Eq. 80: KL_{t+d} in the returns, the live s_t's own included; no gradient
    V_hat = n_step_returns(r, terminated, truncated, V_final, V_n, gamma).detach()  # Eq. 54
    Delta = V_hat - V.detach()  # Delta_t = sum_d gamma^d delta_{t+d}, Eq. 36 and 54
    L_policy = (-log_pi_a * Delta + tau * KL).mean()  # Eq. 84
    L_value = 0.5 * (V - V_hat).square().mean()  # Eq. 85
    L = L_policy + c * L_value  # Eq. 86
    entropy = -kl_divergence(log_pi, 0.0).mean()
    return L, dict(loss=L, policy_loss=L_policy, value_loss=L_value, entropy=entropy, V=V.mean(),
                   V_hat=V_hat.mean(), V_hat_sq=V_hat.square().mean(),
                   Delta=Delta.mean(), Delta_sq=Delta.square().mean())


def sample(log_pi, gumbel):
    """a ~ pi by the Gumbel-max rule, (..., A) -> (...) int64."""
    return (log_pi + gumbel).argmax(-1)


# === flags ===
@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 80_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until the learning rate is 0; 0: total-timesteps
    tau: float = 0.01  # temperature of the regulariser, in units of clipped reward
    regularizer: Literal["entropy", "kl"] = "entropy"  # log pi_bar = 0, or -log|A| (uniform)
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 16  # environments stepped together (N)
    num_steps: int = 5  # agent steps per environment and update (n, T)
    learning_rate: float = 7e-4  # RMSProp step size at the start, decays linearly
    vf_coef: float = 0.5  # c, weight of the value loss, which is half the squared error
    max_grad_norm: float = 0.5  # largest norm of the gradient, all parameters together
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
              num_envs=(1, 1024), num_steps=(1, 1000), learning_rate=(0, 1e6), vf_coef=(0, 1e6),
              max_grad_norm=(1e-12, 1e12))


# === algorithm ===
def train(args):
    """Trains until args.total_timesteps, or with args.evaluate only evaluates; returns statistics.

    Raises Refused on flags that make no sense or a checkpoint that does not fit, FloatingPointError
    if losses are not finite, OSError if the last save fails, SystemExit after it on a signal.
    """
    with closing(Run(args, LIMITS)) as run:
        args, device, T, N = run.args, run.device, run.args.num_steps, run.args.num_envs
        envs = Atari(args, N)
        A = envs.n_actions
        net = ActorCritic(A).to(device, memory_format=torch.channels_last)
        optimizer = RMSpropTF(net.parameters(), torch.tensor(args.learning_rate, device=device))
        noise = torch.Generator(device)
        constant = {"entropy": 0.0, "kl": -math.log(A)}[args.regularizer]
        log_pi_bar = torch.full((A,), constant, device=device)  # alone decides the convention

        @torch.no_grad()
        def act(obs, generator):  # (N, 4, 84, 84) -> (N,)
            return sample(net(obs)[0], gumbel_noise((len(obs), A), generator))

        run.restore(net=net, optimizer=optimizer)
        if args.evaluate:
            return run.evaluate(act, "sampled from pi")

        # all of these stay where they are, as a CUDA graph demands
        obs = torch.zeros((T + 1, N, *OBS_SHAPE), dtype=torch.uint8, device=device)
        actions = torch.zeros((T, N), dtype=torch.int64, device=device)
        facts = torch.zeros((3, T, N), device=device)  # reward, terminated, truncated
        V_final, gumbel = torch.zeros((T, N), device=device), torch.zeros((T, N, A), device=device)
        rollout = Rollout(obs, actions, *facts, V_final)
        screens, outcomes = Pinned(obs), Pinned(facts)
        host = np.zeros((3, T, N), np.float32)
        kept = [None] * T if args.fast else None  # activations of the rollout

        @torch.no_grad()
        def choose(t):
            actions[t] = sample(net(obs[t], kept, t)[0], gumbel[t])

        def update():
            # targets and loss
            with torch.no_grad():
                V_n = net(obs[T])[1]  # (N,) V(s_{t+n})
            log_pi, V = net(obs[:T], kept)  # (T, N, A), (T, N); kept has it all but the gradient
            L, terms = losses(log_pi, V, rollout, V_n, log_pi_bar, args.tau, args.gamma,
                              args.vf_coef)

            # step
            optimizer.zero_grad()
            L.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)
            optimizer.step(torch.isfinite(L) & torch.isfinite(norm))
            return dict(terms, grad_norm=norm)

        choose = captured(choose, args, device)
        update = captured(update, args, device, net, optimizer)
        screens.send(T, envs.reset(seeds(args.seed, run.step, "training", N)))

        while run.goes_on(act, "sampled from pi"):
            # rollout: n steps with the current policy
            obs[0] = obs[T]
            noise.manual_seed(int(seeds(args.seed, run.step, "noise", 1)[0]))  # no state to save
            gumbel.copy_(gumbel_noise((T, N, A), noise))
            V_final.zero_()
            for t in range(T):
                choose(t)
                s, reward, terminated, truncated, final_s = envs.step(actions[t].cpu().numpy())
                screens.send(t + 1, s)
                host[:, t] = np.sign(reward), terminated, truncated
                if truncated.any():  # rare; s already is the next game's, final_s the cut game's
                    cut = torch.from_numpy(truncated).to(device)
                    with torch.no_grad():
                        V_final[t, cut] = net(torch.from_numpy(final_s).to(device)[cut])[1]
                run.count_games(envs.ended)
            outcomes.send(slice(None), host)

            # targets, loss, step
            lr = args.learning_rate * max(0.0, 1 - run.step / args.schedule_timesteps)
            optimizer.param_groups[0]["lr"].fill_(lr)
            run.count(update())
            run.step += T * N

            # log, save
            if run.due("log"):
                row = run.means()
                row["explained_variance"] = explained_variance(row)
                row["KL_uniform"] = math.log(A) - row["entropy"]
                run.log(dict(row, learning_rate=lr))
            if run.due("checkpoint"):  # new games, so that a resumed run equals an unbroken one
                run.save(restarts=True)
                screens.send(T, envs.reset(seeds(args.seed, run.step, "training", N)))
        return run.finish()


def gumbel_noise(shape, generator):
    """Standard Gumbel noise on the generator's device."""
    noise = torch.empty(shape, device=generator.device)
    return -noise.exponential_(generator=generator).log()


def explained_variance(row):
    """Takes the moments out of a row of means; returns 1 - Var(V_hat - V) / Var(V_hat), or NaN."""
    variance = row.pop("V_hat_sq") - row["V_hat"] ** 2
    residual = row.pop("Delta_sq") - row.pop("Delta") ** 2
    return 1 - residual / variance if variance > 0 else math.nan


# === shared: network ===
OBS_SHAPE = (4, 84, 84)  # four frames, oldest first


class ActorCritic(nn.Module):
    """Policy and value head on the trunk of Mnih et al. (2015), no padding: 3136 features.

    Orthogonal weights with gain sqrt(2), 1 in both heads, and zero biases, as the authors' A2C.
    """

    def __init__(self, n_actions):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        )
        self.pi, self.V = nn.Linear(512, n_actions), nn.Linear(512, 1)
        for layer in (*self.trunk, self.pi, self.V):
            if hasattr(layer, "weight"):
                head = layer is self.pi or layer is self.V
                nn.init.orthogonal_(layer.weight, 1.0 if head else math.sqrt(2))
                nn.init.zeros_(layer.bias)

    def features(self, obs, kept=None, t=None):
        """obs (..., 4, 84, 84) uint8 -> (..., 512).

        With kept, a list, and t the activations stay in kept[t]. With kept alone they are taken
        from there, all t after one another, and nothing but the gradient will be computed.
        """
        if kept is not None and t is None:
            h, *after = map(torch.cat, zip(*kept))
            for layer, y in zip((x for x in self.trunk if hasattr(x, "weight")), after):
                h = Recalled.apply(h, layer.weight, layer.bias, y, getattr(layer, "stride", None))
            return h.view(*obs.shape[:-3], 512)
        # uint8 until here: a quarter of the memory and of the copies. Stacking along a last axis is
        # channels-last in half the time of .to(memory_format=...).
        h = torch.stack(obs.flatten(end_dim=-4).unbind(1), -1).permute(0, 3, 1, 2)
        h = h.float().div_(255)
        activations = [h]
        for layer in self.trunk:
            h = layer(h)
            activations += [h] if isinstance(layer, nn.ReLU) else []
        if kept is not None:
            kept[t] = activations
        return h.view(*obs.shape[:-3], 512)

    def forward(self, obs, kept=None, t=None):
        """obs (..., 4, 84, 84) uint8 -> log pi(. | s) (..., A), V(s) (...); kept as features()."""
        h = self.features(obs, kept, t)
        return self.pi(h).log_softmax(-1), self.V(h).squeeze(-1)


class Recalled(torch.autograd.Function):
    """y = relu(layer(x)), computed when acting: forward returns it, backward is autograd's own.

    With the parameters still the same it saves the update a second forward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, y, stride):
        ctx.save_for_backward(x, weight, y)
        ctx.stride = stride  # None in a fully connected layer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, weight, y = ctx.saved_tensors
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
        if not ctx.stride:
            return (dy @ weight).view_as(x), dy.T @ x.flatten(1), dy.sum(0), None, None
        wanted = [ctx.needs_input_grad[0], True, True]
        gradients = torch.ops.aten.convolution_backward(
            dy, x, weight, [len(weight)], ctx.stride, [0, 0], [1, 1], False, [0, 0], 1, wanted)
        return *gradients, None, None
# === end shared ===


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


# === shared: RMSProp ===
class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 computed it: mean square from one, epsilon inside the root.

    torch.optim.RMSprop (from zero, outside) makes the first updates thousands of times larger.
    lr is a 0-dim tensor, which a captured graph can read anew.
    """

    def __init__(self, params, lr, decay=0.99, eps=1e-5):
        super().__init__(params, dict(lr=lr, decay=decay, eps=eps))
        for p in self.param_groups[0]["params"]:
            self.state[p]["mean_square"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self, finite):
        """One update, or none where finite, a () bool tensor, is False: the host need not look."""
        for group in self.param_groups:
            lr = group["lr"] * finite
            weight = finite.to(lr.dtype) * (1 - group["decay"])
            for p in group["params"]:  # in place: new memory costs more than the arithmetic
                mean_square, g = self.state[p]["mean_square"], p.grad.nan_to_num_(0.0, 0.0, 0.0)
                mean_square.lerp_(g * g, weight.to(g.dtype))
                p.sub_((mean_square + group["eps"]).rsqrt_().mul_(g).mul_(lr))
# === end shared ===


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
