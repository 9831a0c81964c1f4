"""Damped Q regression: soft Q-learning whose step is a natural policy gradient, run on Atari.

Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
         arXiv:1704.06440, section 5, which proves it and runs nothing. Equations 21, 36, 47, 53,
         54, 57, 66-78; 54, 66, 71 and 78 are misprinted in the text and stand here corrected: a
         damping eps of the Q target is a natural gradient step of size eps / tau (printed eps).
Train:   python natural_pg_damped.py --env-id ALE/Pong-v5 --total-timesteps 10000000
Arms:    the nonlinear regression by several passes, --solver regression; one Gauss-Newton step by
         conjugate gradients, --solver cg; --target-kl 0.002 sets eps in either so that the
         natural gradient step would move the policy by that KL
Resume:  python natural_pg_damped.py --resume runs/Pong__natural_pg_damped__seed1__20260101-120000
Score:   python natural_pg_damped.py --evaluate runs/Pong__natural_pg_damped__seed1__20260101-120000
Expect:  nothing is published; README.md has what was measured with this file.

Shapes:  T steps of N environments, B = T N samples, A actions. s_t is a stack of 4 frames, 84 x 84,
         uint8. v is a vector in the space of theta, all parameters of the policy in one row.
Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature, psi_t
         = grad log pi(a_t | s_t), Delta_t the n-step advantage, A_t = Q_hat - Q_old what becomes of
         it in Q: Delta_t - tau (log pi / pi_bar - KL_t), all with pi_old.
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
from typing import Callable, Literal, NamedTuple, get_args

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
    """What a rollout leaves for the fits; all of it is from before them, and held fixed."""

    s: torch.Tensor  # (B, 4, 84, 84) uint8, s_t
    a: torch.Tensor  # (B,) int64, a_t ~ pi_old(. | s_t)
    log_pi: torch.Tensor  # (B, A) log pi_old
    log_ratio: torch.Tensor  # (B,) log pi_old(a_t | s_t) - log pi_bar(a_t | s_t)
    V: torch.Tensor  # (B,) V_old(s_t)
    V_hat: torch.Tensor  # (B,) the target of V
    A: torch.Tensor  # (B,) A_t = Q_hat - Q_old


class Jacobian(NamedTuple):
    """d log pi / d theta at theta_old on a batch, as linear maps. Row t of Psi (B, P) is psi_t."""

    times: Callable  # v (P,) -> (B, A), the change of log pi to first order, Eq. 67
    Psi: Callable  # v (P,) -> Psi v (B,), the same for the actions taken
    Psi_T: Callable  # u (B,) -> Psi^T u (P,)


def kl_divergence(log_pi, log_pi_bar):
    """KL[pi || pi_bar](s), (..., A) -> (...). With log_pi_bar = 0 it is minus the entropy of pi."""
    return (log_pi.exp() * (log_pi - log_pi_bar)).sum(-1)


def td_errors(r, KL, terminated, truncated, V, V_final, tau, gamma):
    """delta_t of Eq. 36; all (T, N), but V (T+1, N). V_final is V where the time limit cut."""
    V_next = torch.where(truncated > 0, V_final, V[1:])
    return r - tau * KL + gamma * (1 - terminated) * V_next - V[:-1]  # Eq. 36


def advantages(delta, ends, gamma, n):
    """Delta_t = sum_{d<n} gamma^d delta_{t+d} (Eq. 47), up to an end of game or rollout; (T, N)."""
    Delta = delta
    for _ in range(min(n, len(delta)) - 1):  # one step more
        later = torch.cat([Delta[1:], torch.zeros_like(Delta[:1])])
        Delta = delta + gamma * (1 - ends) * later
    return Delta


def q_step(Delta, log_ratio_old, KL_old, tau):
    """A_t = Q_hat - Q_old at (s_t, a_t), all taken before the update; V_old cancels; any shape."""
    Q_hat = tau * KL_old + Delta  # Eq. 47, less V_old
    Q_old = tau * log_ratio_old  # Eq. 57, less V_old
    return Q_hat - Q_old  # Eq. 75, 76; the bracket of Eq. 70


def log_pi_target(log_pi_old, A, eps, tau):
    """What log pi(a_t | s_t) is fitted to; any shape. eps has no unit, eps/tau is per reward.

    Eq. 71 prints pi_theta inside A, Eq. 78 lacks the 1/tau.
    """
    return log_pi_old + eps / tau * A  # Eq. 71, 78


def regression_loss(log_pi, target):
    """The loss of each sample; at theta_old its gradient is -eps/tau psi_t A_t, Eq. 68, 71."""
    return 0.5 * (log_pi - target).square()  # Eq. 71


def damped_q_loss(V, log_ratio, V_old, log_ratio_old, A, eps, tau):
    """1/2 (Q - Q_hat^eps)^2. With V = V_old it is tau^2 regression_loss, for every theta; Eq. 78.

    eps = 1 is plain soft Q-learning, Eq. 72, 73: a natural gradient step of size 1 / tau.
    """
    Q, Q_old = V + tau * log_ratio, V_old + tau * log_ratio_old  # Eq. 57
    Q_eps = Q_old + eps * A  # Eq. 74: Q_old + eps (Q_hat - Q_old)
    return 0.5 * (Q - Q_eps).square()  # Eq. 77


def policy_gradient(J, A):
    """g_hat = mean_t psi_t A_t, (P,), Eq. 70. On average over a_t ~ pi it is Eq. 69, by Eq. 21."""
    return J.Psi_T(A) / len(A)


def sampled_fisher(J, v):
    """F_hat v = mean_t psi_t psi_t^T v, (P,), over the actions taken: Psi^T Psi / B of Eq. 66."""
    Psi_v = J.Psi(v)
    return J.Psi_T(Psi_v) / len(Psi_v)


def all_action_fisher(log_pi, Jv, Jw):
    """v^T F_all w, (), from J.times(v), J.times(w) (B, A): each action in its proportion."""
    return (log_pi.exp() * Jv * Jw).sum(-1).mean()


def conjugate_gradient(product, g, iterations, tolerance=1e-10):
    """Solves product(x) = g, (P,) -> (P,), symmetric and positive (Hestenes and Stiefel, 1952).

    Returns x, the norm of g - product(x), as the recurrence has it, over that of g, and how many
    iterations were made. Below the tolerance, or where product is not positive, x stays as it is:
    so the host need not look.
    """
    x, left, rr, made = torch.zeros_like(g), g, g @ g, torch.zeros_like(g[0])
    p, least = g, tolerance**2 * rr
    for _ in range(iterations):
        Fp = product(p)
        curvature = p @ Fp
        active = (rr > least) & (curvature > 0)
        alpha = torch.where(active, rr / curvature, 0.0)
        x, left = x + alpha * p, left - alpha * Fp
        new, made = left @ left, made + active
        p, rr = left + torch.where(active, new / rr, 0.0) * p, new
    return x, (rr / (g @ g).clamp(min=1e-30)).sqrt(), made


def natural_gradient(J, A, damping, iterations):
    """x = (F_hat + lambda I)^-1 g_hat, Eq. 66 without its eps, which Eq. 67 counts again.

    theta_old + eps/tau x is one Gauss-Newton step on either loss, damped by lambda; on the side of
    Q the same damping is tau^2 lambda. Returns what conjugate_gradient returns.
    """
    g = policy_gradient(J, A)
    return conjugate_gradient(lambda v: sampled_fisher(J, v) + damping * v, g, iterations)


def quadratic_kl(eps, tau, xFx):
    """KL[pi_old || pi] of the step eps/tau x in nats, to second order; xFx = x^T F_all x."""
    return 0.5 * (eps / tau) ** 2 * xFx


def eps_for_kl(target_kl, tau, xFx):
    """The eps whose quadratic_kl is target_kl, but at most 1: that is the undamped Q target."""
    return (tau * (2 * target_kl / xFx.clamp(min=1e-30)).sqrt()).clamp(max=1.0)


def sample(log_pi, gumbel):
    """a ~ pi by the Gumbel-max rule, (..., A) -> (...) int64."""
    return (log_pi + gumbel).argmax(-1)


# === flags ===
@dataclasses.dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 80_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until eps and step sizes are 0; 0: total-timesteps
    solver: Literal["regression", "cg"] = "regression"  # passes of Adam, or one Gauss-Newton step
    eps: float = 1e-3  # damping of the Q target at the start, 0 to 1; decays linearly
    target_kl: float = 0.0  # KL in nats of a natural gradient step, which sets eps; 0: eps is given
    tau: float = 0.01  # temperature of the regulariser, in units of clipped reward
    regularizer: Literal["entropy", "kl"] = "entropy"  # log pi_bar = 0, or -log|A| (uniform)
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 16  # environments stepped together (N)
    num_steps: int = 32  # agent steps per environment and rollout (T)
    n_step: int = 16  # agent steps in an advantage (n), less where the rollout ends
    passes: int = 4  # passes of the regression over a rollout
    minibatch_size: int = 128  # samples per step of Adam, policy and value
    learning_rate: float = 2.5e-4  # Adam step size of the policy at the start, decays linearly
    value: Literal["separate", "head", "shared"] = "separate"  # V: own trunk, own head, joint trunk
    value_passes: int = 2  # passes of the value fit over a rollout
    value_learning_rate: float = 2.5e-4  # Adam step size of the value at the start, decays linearly
    max_grad_norm: float = 0.5  # largest norm of a minibatch's gradient, policy or value
    damping: float = 0.1  # lambda, added to F_hat; in units of psi^2
    cg_iterations: int = 10  # of conjugate gradients, one Fisher-vector product each
    measure_every: int = 40  # batches between measurements of a step, 0: none; rows have means
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


LIMITS = dict(total_timesteps=(1, 1e12), schedule_timesteps=(0, 1e12), eps=(0, 1),
              target_kl=(0, 10), tau=(1e-6, 1e6), gamma=(0, 1), num_envs=(1, 1024),
              num_steps=(1, 10_000), n_step=(1, 10_000), passes=(1, 1000),
              minibatch_size=(1, 1e7), learning_rate=(0, 1e6), value_passes=(1, 1000),
              value_learning_rate=(0, 1e6), max_grad_norm=(1e-12, 1e12), damping=(0, 1e6),
              cg_iterations=(1, 10_000), measure_every=(0, 1e12))
SOLVED = "cg_iterations", "cg_residual", "kl_predicted"  # in metrics.csv
MEASURED = ("cosine", "cosine_fisher", "norm_ratio", "kl_measured", "kl_quadratic", "kl_refit",
            "kl_refit_quadratic")  # the same


# === algorithm ===
def train(args):
    """Trains until args.total_timesteps, or with args.evaluate only evaluates; returns statistics.

    Raises Refused on flags that make no sense or a checkpoint that does not fit, FloatingPointError
    if losses are not finite, OSError if the last save fails, SystemExit after it on a signal.
    """
    with closing(Run(args, LIMITS)) as run:
        args, device, T, N = run.args, run.device, run.args.num_steps, run.args.num_envs
        envs, tau, B = Atari(args, N), args.tau, T * N
        A = envs.n_actions
        constant = {"entropy": 0.0, "kl": -math.log(A)}[args.regularizer]
        log_pi_bar = torch.full((A,), constant, device=device)  # alone decides the convention
        torch.backends.cudnn.allow_tf32 = False  # it keeps 3 digits; a step changes the third
        net = PolicyAndValue(A, args.value).to(device, memory_format=torch.channels_last)
        adam = adam_of(net.of("pi"), args.learning_rate, device)
        adam_V = adam_of(net.of("V"), args.value_learning_rate, device)
        noise = torch.Generator(device)
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        nothing = dict.fromkeys(("solved", *SOLVED, "measured", *MEASURED), zero)
        cg_seconds = 0.0  # wall time of conjugate gradients since the row

        @torch.no_grad()
        def act(obs, generator):  # (N, 4, 84, 84) -> (N,)
            return sample(net(obs), gumbel_noise((len(obs), A), generator))

        run.restore(net=net, optimizer=adam, optimizer_V=adam_V)
        if args.evaluate:
            return run.evaluate(act, "sampled from pi")

        # all of these stay where they are, as a CUDA graph demands
        obs = torch.zeros((T + 1, N, *OBS_SHAPE), dtype=torch.uint8, device=device)
        actions = torch.zeros((T, N), dtype=torch.int64, device=device)
        facts = torch.zeros((3, T, N), device=device)  # reward, terminated, truncated
        log_pi, gumbel = (torch.zeros((T, N, A), device=device) for _ in "12")
        V_final, host = torch.zeros((T, N), device=device), np.zeros((3, T, N), np.float32)
        screens, outcomes = Pinned(obs), Pinned(facts)

        @torch.no_grad()
        def choose(t):
            log_pi[t] = net(obs[t])
            actions[t] = sample(log_pi[t], gumbel[t])

        # what the fits read; `chosen` lists the samples of a minibatch
        s_B, a_B = obs[:T].flatten(0, 1), actions.flatten()  # (B, ...), the rollout's own memory
        target, V_hat, policy_loss = (torch.zeros(n, device=device) for n in ((B,), (B,), ()))
        chosen = torch.zeros(min(B, args.minibatch_size), dtype=torch.int64, device=device)

        def fit_policy(size):
            i = chosen[:size]
            L = regression_loss(at(net(s_B[i]), a_B[i]), target[i]).mean()
            return descend(L, adam, args)

        def fit_value(size):
            i = chosen[:size]
            L = 0.5 * (net.V(s_B[i]) - V_hat[i]).square().mean()  # Eq. 53
            return descend(L + 0 * policy_loss, adam_V, args)  # none if the policy step failed

        def fit(step, passes):  # (), the mean loss
            losses = []
            for i in minibatches(passes, B, len(chosen), noise):
                chosen[:len(i)].copy_(i)
                losses.append(step(len(i)).clone())  # the next step overwrites it
            return torch.stack(losses).mean()

        choose = captured(choose, args, device)
        fit_policy = captured(fit_policy, args, device, net, adam)
        fit_value = captured(fit_value, args, device, net, adam_V)
        screens.send(T, envs.reset(seeds(args.seed, run.step, "training", N)))

        while run.goes_on(act, "sampled from pi"):
            # rollout: T steps with pi_old
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
                        V_final[t, cut] = net.V(torch.from_numpy(final_s).to(device)[cut])
                run.count_games(envs.ended)
            outcomes.send(slice(None), host)
            r, terminated, truncated = facts

            # targets: all that is called old stays as it is from here on
            with torch.no_grad():
                V_old = net.V(obs)  # (T+1, N)
            KL = kl_divergence(log_pi, log_pi_bar)
            delta = td_errors(r, KL, terminated, truncated, V_old, V_final, tau, args.gamma)
            Delta = advantages(delta, torch.maximum(terminated, truncated), args.gamma, args.n_step)
            V_hat.copy_((V_old[:T] + Delta).flatten())  # Eq. 54
            log_ratio = at(log_pi - log_pi_bar, actions)
            A_t = q_step(Delta, log_ratio, KL, tau)
            rows = (x.flatten(0, 1) for x in (log_pi, log_ratio, V_old[:T]))
            old = Batch(s_B, a_B, *rows, V_hat, A_t.flatten())

            # eps, and the natural gradient where one is wanted
            left = max(0.0, 1 - run.step / args.schedule_timesteps)
            eps, solution = torch.full((), args.eps * left, device=device), None
            K = args.measure_every
            measured = K and (run.step // B + 1) % K == 0
            if args.solver == "cg" or args.target_kl or measured:
                solution, seconds = solve(net, old, args)
                cg_seconds += seconds
                if args.target_kl:
                    eps = left * eps_for_kl(args.target_kl, tau, solution.xFx)

            # policy step: fit Q = V_old + tau log(pi / pi_bar) to the damped target
            theta_old, log_pi_a = flat(net.of("pi")), at(old.log_pi, old.a)
            target.copy_(log_pi_target(log_pi_a, old.A, eps, tau))
            if args.solver == "cg":
                finite = move(net.of("pi"), eps / tau * solution.x)  # Eq. 66, 67
                L = regression_loss(log_pi_a, target).mean()
                policy_loss.copy_(torch.where(finite, L, math.nan))
            else:
                adam.param_groups[0]["lr"].fill_(args.learning_rate * left)
                policy_loss.copy_(fit(fit_policy, args.passes))
            d = flat(net.of("pi")) - theta_old
            with torch.no_grad():
                log_pi_new = net(old.s)

            # value step: fit V on its own, unless the policy step failed
            adam_V.param_groups[0]["lr"].fill_(args.value_learning_rate * left)
            value_loss = fit(fit_value, args.value_passes)

            # log, save
            terms = dict(policy_loss=policy_loss, value_loss=value_loss)
            terms |= statistics(old, log_pi_new, log_pi_bar, eps, tau) | nothing
            if solution is not None:
                terms |= dict(solved=one, cg_iterations=solution.iterations,
                              cg_residual=solution.residual,
                              kl_predicted=quadratic_kl(eps, tau, solution.xFx))
            if measured:
                with torch.no_grad():
                    log_pi_refit = net(old.s)
                d_refit = flat(net.of("pi")) - theta_old
                terms |= measure(solution, d, d_refit, old.log_pi, log_pi_new, log_pi_refit,
                                 eps, tau)
            del solution  # with the activations of the batch
            run.count(terms)
            run.step += B
            if run.due("log"):
                lr = args.learning_rate * left
                row = row_of(run.means(), constant, A)
                run.log(dict(row, learning_rate=lr, cg_seconds=cg_seconds))
                cg_seconds = 0.0
            if run.due("checkpoint"):  # new games, so that a resumed run equals an unbroken one
                run.save(restarts=True)
                screens.send(T, envs.reset(seeds(args.seed, run.step, "training", N)))
        return run.finish()


def at(log_pi, a):
    """log pi(a | s) from (..., A) and (...)."""
    return log_pi.gather(-1, a.unsqueeze(-1)).squeeze(-1)


def minibatches(passes, B, size, generator):
    """Yields the indices of minibatches, each pass over B samples in a new order."""
    for _ in range(passes):
        yield from torch.randperm(B, generator=generator, device=generator.device).split(size)


def adam_of(parameters, lr, device):
    """Adam with the epsilon of PPO's authors; the learning rate is a tensor, which train() sets.

    Its state is made here, as a CUDA graph finds its tensors where they were before.
    """
    adam = torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), eps=1e-5, fused=True,
                            capturable=device.type == "cuda")
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=device)
        adam.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return adam


def descend(L, optimizer, args):
    """One step of Adam, or none if loss or gradient is not finite; returns the loss.

    found_inf is how gradient scaling tells the fused Adam to leave a step out: the host need not
    look.
    """
    optimizer.zero_grad()
    L.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
    optimizer.grad_scale, optimizer.found_inf = None, 1 - (L.isfinite() & norm.isfinite()).float()
    optimizer.step()
    return L.detach()


def flat(parameters):
    """A copy of them in one row, (P,)."""
    return torch.cat([p.detach().flatten() for p in parameters])


@torch.no_grad()
def move(parameters, step):
    """Adds a step (P,) to them, or nothing if it is not finite; returns whether it is, ()."""
    finite = step.isfinite().all()
    for p, part in zip(parameters, step.split([p.numel() for p in parameters])):
        p.add_(torch.where(finite, part, 0.0).view_as(p))
    return finite


def jacobian(log_pi_of, theta, a):
    """The Jacobian at theta (P,) of a function from theta to log pi (B, A), with a (B,)."""
    def times(v):
        return torch.func.jvp(log_pi_of, (theta,), (v,))[1]

    _, transposed = torch.func.vjp(lambda theta: at(log_pi_of(theta), a), theta)
    return Jacobian(times, lambda v: at(times(v), a), lambda u: transposed(u)[0])


class Solution(NamedTuple):
    """What conjugate gradients found on a batch."""

    J: Jacobian
    x: torch.Tensor  # (P,) the natural gradient
    Jx: torch.Tensor  # (B, A)
    xFx: torch.Tensor  # () x^T F_all x
    residual: torch.Tensor  # () |g_hat - F_hat x - lambda x| / |g_hat|
    iterations: torch.Tensor  # ()


@torch.no_grad()
def solve(net, old, args):
    """The natural gradient on a batch by conjugate gradients, its length, and the wall time."""
    began, parameters = clock(old.s.device), net.of("pi")
    names, sizes = net.names("pi"), [p.numel() for p in parameters]

    def log_pi_of(theta):
        parts = (part.view_as(p) for part, p in zip(theta.split(sizes), parameters))
        return torch.func.functional_call(net, dict(zip(names, parts)), (old.s,))

    J = jacobian(log_pi_of, flat(parameters), old.a)
    x, residual, iterations = natural_gradient(J, old.A, args.damping, args.cg_iterations)
    Jx = J.times(x)
    solution = Solution(J, x, Jx, all_action_fisher(old.log_pi, Jx, Jx), residual, iterations)
    return solution, clock(old.s.device) - began


def clock(device):
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


@torch.no_grad()
def measure(solution, d, d_refit, log_pi_old, log_pi_new, log_pi_refit, eps, tau):
    """Compares the step d (P,) that was taken with the natural gradient step on the same batch.

    d_refit and log_pi_refit are after the value step, which moves the policy where trunks are
    shared. cosine_fisher and the KLs do not depend on how the policy is parameterised. x is what
    conjugate gradients left after their iterations, and is damped.
    """
    x, Jx, xFx, Jd, Jd_refit = *solution[1:4], *map(solution.J.times, (d, d_refit))
    dFx, dFd, rFr = (all_action_fisher(log_pi_old, *pair)
                     for pair in ((Jd, Jx), (Jd, Jd), (Jd_refit, Jd_refit)))
    return dict(measured=torch.ones_like(xFx),
                cosine=ratio(d @ x, d.norm() * x.norm()),
                cosine_fisher=ratio(dFx, dFd.sqrt() * xFx.sqrt()),
                norm_ratio=ratio(d.norm(), eps / tau * x.norm()),
                kl_measured=kl_moved(log_pi_old, log_pi_new), kl_quadratic=0.5 * dFd,
                kl_refit=kl_moved(log_pi_old, log_pi_refit), kl_refit_quadratic=0.5 * rFr)


def ratio(a, b):
    """a / b, or 0 where b is 0, as with eps = 0."""
    return torch.where(b == 0, 0.0, a / b)


def kl_moved(log_pi_old, log_pi_new):
    """Mean KL[pi_old || pi_new], (). In float32 pi sums to 1 up to 1e-7, which counted as KL."""
    return kl_divergence(*(x.double().log_softmax(-1) for x in (log_pi_old, log_pi_new))).mean()


@torch.no_grad()
def statistics(old, log_pi_new, log_pi_bar, eps, tau):
    """Means over a batch for metrics.csv; residual: the share of the damped Q loss that is left.

    It is that of the policy fit, with V = V_old, and in float64, as V takes digits from Q.
    """
    V, log_ratio, log_ratio_old = (x.double() for x in (
        old.V, at(log_pi_new - log_pi_bar, old.a), old.log_ratio))
    after, before = (damped_q_loss(V, x, V, log_ratio_old, old.A, eps, tau).mean()
                     for x in (log_ratio, log_ratio_old))
    Delta = old.V_hat - old.V
    terms = dict(V=old.V, V_hat=old.V_hat, V_hat_sq=old.V_hat.square(), Delta=Delta,
                 Delta_sq=Delta.square(), KL=kl_divergence(old.log_pi, log_pi_bar),
                 kl_moved=kl_moved(old.log_pi, log_pi_new), eps=eps, q_loss=after,
                 residual=ratio(after, before))
    return {name: term.mean() for name, term in terms.items()}


def row_of(means, constant, A):
    """The means over a row's updates as what metrics.csv says of them; constant is log pi_bar."""
    for share, names in ((means.pop("solved"), SOLVED), (means.pop("measured"), MEASURED)):
        means |= {k: means[k] / share if share else math.nan for k in names}
    means["explained_variance"] = explained_variance(means)
    means["entropy"] = -means.pop("KL") - constant
    return dict(means, KL_uniform=math.log(A) - means["entropy"])


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


# === two networks in one ===
class PolicyAndValue(nn.Module):
    """pi and V, on trunks of their own (value "separate") or as two heads of one."""

    def __init__(self, n_actions, value):
        super().__init__()
        self.value, self.actor = value, ActorCritic(n_actions)
        if value == "separate":
            self.critic = ActorCritic(n_actions)
            del self.actor.V, self.critic.pi

    def forward(self, obs):
        """obs (..., 4, 84, 84) uint8 -> log pi(. | s) (..., A)."""
        return self.actor.pi(self.actor.features(obs)).log_softmax(-1)

    def V(self, obs):
        """obs (..., 4, 84, 84) uint8 -> V(s) (...)."""
        of = self.critic if self.value == "separate" else self.actor
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.value != "head"):
            h = of.features(obs)
        return of.V(h).squeeze(-1)

    def names(self, what):
        """Names of the parameters that the fit of "pi" or "V" moves."""
        moved = {"pi": ("actor.trunk", "actor.pi")}.get(what) or {
            "separate": ("critic",), "head": ("actor.V",), "shared": ("actor.trunk", "actor.V"),
        }[self.value]
        return [name for name, _ in self.named_parameters() if name.startswith(moved)]

    def of(self, what):
        """These parameters."""
        return [self.get_parameter(name) for name in self.names(what)]


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
