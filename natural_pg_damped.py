"""Damped Q regression: soft Q-learning whose step is a natural policy gradient, run on Atari.

  Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
           arXiv:1704.06440, section 5, which proves it and runs nothing. Equations 21, 36, 47, 53,
           54, 57 and 66-78; 54, 66, 71 and 78 are misprinted in the text and stand here corrected:
           damping eps of the Q target is a natural gradient step of size eps / tau (printed eps).
  Train:   python natural_pg_damped.py --env-id ALE/Pong-v5 --total-timesteps 10000000
  Arms:    --solver regression fits log pi by passes of Adam; --solver cg takes one Gauss-Newton
           step by conjugate gradients; --target-kl 0.002 sets eps so that the natural gradient
           step would move the policy by that KL.
  Expect:  nothing is published; README.md has what was measured with this file.
  Resume:  python natural_pg_damped.py --resume runs/Pong__natural_pg_damped__seed1__20260101-120000
  Shapes:  T steps of N environments, B = T N samples, A actions. s_t is a stack of 4 frames,
           84 x 84, uint8. v is a vector in the space of theta, the P parameters of the policy.
  Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature,
           psi_t = grad log pi(a_t | s_t), Delta_t the n-step advantage, A_t = Q_hat - Q_old what
           becomes of it in Q: Delta_t - tau (log pi / pi_bar - KL_t), all with pi_old.
"""
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from subprocess import getoutput as sh
from typing import Callable, Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep
import ale_py
import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

# === the paper ===
def kl_divergence(log_pi, log_pi_bar):
    """KL[pi || pi_bar](s), (..., A) -> (...). With log_pi_bar = 0 it is minus the entropy of pi."""
    return (log_pi.exp() * (log_pi - log_pi_bar)).sum(-1)

def at(log_pi, a):
    """log pi(a | s) of (..., A) and (...), at the actions taken."""
    return log_pi.gather(-1, a.unsqueeze(-1)).squeeze(-1)

def td_errors(r, KL, done, V, tau, gamma):
    """delta_t of Eq. 36, (T, N); r, KL, done (T, N), done 1 where nothing follows; V (T+1, N)."""
    return r - tau * KL + gamma * (1 - done) * V[1:] - V[:-1]  # Eq. 36

def advantages(delta, done, gamma, n):
    """Delta_t = sum_{d<n} gamma^d delta_{t+d} (Eq. 47), up to done or the rollout's end; (T, N)."""
    Delta = delta
    for _ in range(min(n, len(delta)) - 1):  # one step more
        later = torch.cat([Delta[1:], torch.zeros_like(Delta[:1])])
        Delta = delta + gamma * (1 - done) * later
    return Delta

def q_step(Delta, log_ratio_old, KL_old, tau):
    """A_t = Q_hat - Q_old at (s_t, a_t), all taken before the update; V_old cancels; any shape.

    log_ratio_old is log pi_old(a_t | s_t) - log pi_bar(a_t | s_t).
    """
    Q_hat = tau * KL_old + Delta  # Eq. 47, less V_old
    Q_old = tau * log_ratio_old  # Eq. 57, less V_old
    return Q_hat - Q_old  # Eq. 75, 76; the bracket of Eq. 70

def log_pi_target(log_pi_old, A, eps, tau):
    """What log pi(a_t | s_t) is fitted to; any shape. eps has no unit, eps / tau is per reward.

    Eq. 71 prints pi_theta inside A, Eq. 78 lacks the 1 / tau.
    """
    return log_pi_old + eps / tau * A  # Eq. 71, 78

def regression_loss(log_pi, target):
    """The loss of each sample; at theta_old its gradient is -eps / tau psi_t A_t, Eq. 68, 71."""
    return 0.5 * (log_pi - target).square()  # Eq. 71

def damped_q_loss(V, log_ratio, V_old, log_ratio_old, A, eps, tau):
    """1/2 (Q - Q_hat^eps)^2. With V = V_old it is tau^2 regression_loss, for every theta; Eq. 78.

    eps = 1 is plain soft Q-learning, Eq. 72, 73: a natural gradient step of size 1 / tau.
    """
    Q, Q_old = V + tau * log_ratio, V_old + tau * log_ratio_old  # Eq. 57
    Q_eps = Q_old + eps * A  # Eq. 74: Q_old + eps (Q_hat - Q_old)
    return 0.5 * (Q - Q_eps).square()  # Eq. 77

class Jacobian(NamedTuple):
    """d log pi / d theta at theta_old on a batch, as linear maps. Row t of Psi (B, P) is psi_t."""
    times: Callable  # v (P,) -> (B, A), the change of log pi to first order, Eq. 67
    Psi: Callable  # v (P,) -> Psi v (B,), the same for the actions taken
    Psi_T: Callable  # u (B,) -> Psi^T u (P,)

def jacobian(log_pi_of, theta, a):
    """The Jacobian at theta (P,) of a function from theta to log pi (B, A), with a (B,)."""
    def times(v):
        return torch.func.jvp(log_pi_of, (theta,), (v,))[1]

    _, transposed = torch.func.vjp(lambda theta: at(log_pi_of(theta), a), theta)
    return Jacobian(times, lambda v: at(times(v), a), lambda u: transposed(u)[0])

def policy_gradient(J, A):
    """g_hat = mean_t psi_t A_t, (P,), Eq. 70. On average over a_t ~ pi it is Eq. 69, by Eq. 21."""
    return J.Psi_T(A) / len(A)

def sampled_fisher(J, v):
    """F_hat v = mean_t psi_t psi_t^T v, (P,), over the actions taken: Psi^T Psi / B of Eq. 66."""
    Psi_v = J.Psi(v)
    return J.Psi_T(Psi_v) / len(Psi_v)

def all_action_fisher(log_pi, Jv, Jw):
    """v^T F_all w, (), of J.times(v), J.times(w) (B, A); F_all: mean_t E_{a ~ pi} psi psi^T."""
    return (log_pi.exp() * Jv * Jw).sum(-1).mean()

def ratio(a, b):
    """a / b of tensors, or 0 where b is not positive: then nothing is left to solve or to move."""
    return torch.where(b <= 0, 0.0, a / b)

def conjugate_gradient(product, g, iterations):
    """Solves product(x) = g, (P,) -> (P,), symmetric and positive (Hestenes and Stiefel, 1952).

    Returns x and |g - product(x)| / |g|, (), as it is kept up to date, not computed from x.
    """
    x, left, p, square = torch.zeros_like(g), g, g, g @ g
    for _ in range(iterations):
        Fp = product(p)
        alpha = ratio(square, p @ Fp)
        x, left = x + alpha * p, left - alpha * Fp
        before, square = square, left @ left
        p = left + ratio(square, before) * p
    return x, ratio(square, g @ g).sqrt()

def natural_gradient(J, A, damping, iterations):
    """x near (F_hat + lambda I)^-1 g_hat, Eq. 66 without its eps, which Eq. 67 counts again.

    theta_old + eps / tau x is one Gauss-Newton step on either loss, damped by lambda; on the side
    of Q the same damping is tau^2 lambda. Returns what conjugate_gradient returns.
    """
    g = policy_gradient(J, A)
    return conjugate_gradient(lambda v: sampled_fisher(J, v) + damping * v, g, iterations)

def quadratic_kl(eps, tau, xFx):
    """KL[pi_old || pi] of the step eps / tau x in nats, to second order; xFx = x^T F_all x."""
    return 0.5 * (eps / tau) ** 2 * xFx

def eps_for_kl(target_kl, tau, xFx):
    """The eps whose quadratic_kl is target_kl, but at most 1: that is the undamped Q target."""
    return (tau * (2 * target_kl / xFx.clamp(min=1e-30)).sqrt()).clamp(max=1.0)

def sample(log_pi, noise):
    """a ~ pi by the Gumbel-max rule, (..., A) -> (...) int64; noise ~ Exp(1), (..., A)."""
    return (log_pi - noise.log()).argmax(-1)

# === flags ===
@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 80_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until eps and step sizes are 0; 0: total-timesteps
    solver: Literal["regression", "cg"] = "regression"  # passes of Adam, or one Gauss-Newton step
    eps: float = 1e-3  # damping of the Q target at the start, 0 to 1; decays linearly
    target_kl: float = 0.0  # KL of a natural gradient step, nats; sets eps <= 1; 0: --eps is used
    tau: float = 0.01  # temperature of the regularizer, in units of clipped reward
    regularizer: Literal["entropy", "kl"] = "entropy"  # log pi_bar = 0, or -log|A| (uniform)
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 16  # environments stepped together (N)
    num_steps: int = 32  # agent steps per environment and rollout (T)
    n_step: int = 16  # agent steps in an advantage (n), fewer where the rollout ends
    passes: int = 4  # passes of the regression over a rollout
    minibatch_size: int = 128  # samples per step of Adam, policy and value
    learning_rate: float = 2.5e-4  # Adam step size of the policy at the start, decays linearly
    value_passes: int = 2  # passes of the value fit over a rollout
    value_learning_rate: float = 2.5e-4  # Adam step size of the value at the start, decays linearly
    max_grad_norm: float = 0.5  # largest norm of a minibatch's gradient, policy or value
    damping: float = 0.1  # lambda, added to F_hat; in units of psi^2
    cg_iterations: int = 10  # iterations of conjugate gradients
    measure_every: int = 40  # batches between comparisons of the step with eps / tau x; 0: none
    save_every: int = 500_000  # agent steps between checkpoints, each with new games; 0: at the end
    # === shared: run flags ===
    seed: int = 1  # network, sampling noise and environments derive from it
    sticky: float = 0.0  # probability that the emulator repeats the last action
    max_episode_frames: int = 108_000  # time limit of a game, in emulator frames
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is a GPU
    threads: int = 0  # CPU threads of PyTorch and of the emulator; 0: their own choice
    compile: bool = False  # torch.compile for acting and loss, on a GPU with CUDA graphs
    log_every: int = 10_000  # agent steps between rows of metrics.csv; 0: only at the end
    eval_every: int = 1_000_000  # agent steps between evaluations; 0: only at the end
    eval_games: int = 20  # full games of an evaluation, one environment each; 0: no evaluations
    resume: str = ""  # folder of a run to continue, with the flags that it was started with
    evaluate: str = ""  # folder of a run whose policy plays --eval-games games, without training
    runs_dir: str = "runs"  # where a new run makes its folder
    tensorboard: bool = False  # TensorBoard files in the run's folder, too (needs tensorboard)

    def __post_init__(self):
        self.schedule_timesteps = self.schedule_timesteps or self.total_timesteps
        self.device = self.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        for name, value in vars(self).items():
            zero = name.endswith("_every") or name in ("seed", "threads", "eval_games")
            high = 1 if name in ("gamma", "sticky", "eps", "eval_epsilon") else math.inf
            low = int(type(value) is int and not zero)
            if not isinstance(value, str) and not low <= value <= high:  # NaN fails this too
                raise ValueError(f"--{name.replace('_', '-')} {value}: it takes {low} to {high}")
    # === end shared ===

MEASURED = ("cg_residual", "cg_seconds", "kl_natural", "cosine", "cosine_fisher", "norm_ratio",
            "kl_measured", "kl_quadratic")  # NaN in a row without a solution or measurement

# === algorithm ===
def train(args):
    """Trains for args.total_timesteps agent steps, or with args.evaluate only plays.

    Raises ValueError if tau is 0, FloatingPointError if losses or parameters are not finite.
    """
    if not args.tau:
        raise ValueError("--tau 0: the step is eps / tau")
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False  # for the process: TF32 has 3 digits, a step is smaller
    device, T, N, tau = torch.device(args.device), args.num_steps, args.num_envs, args.tau
    envs = Atari(args, N)
    A, B = envs.n_actions, T * N
    pi, V = (Network(n).to(device, memory_format=torch.channels_last) for n in (A, 1))
    adam_pi, adam_V = (torch.optim.Adam(net.parameters(), eps=1e-5, fused=True) for net in (pi, V))
    log_pi_bar = {"entropy": 0.0, "kl": -math.log(A)}[args.regularizer]  # decides the convention

    @torch.no_grad()
    def choose(obs, noise):  # (N, 4, 84, 84), (N, A) -> (N, A), (N,)
        log_pi = pi(obs)
        return log_pi, sample(log_pi, noise)

    def act(obs, noise):
        return choose(obs, noise)[1]

    def policy_loss(obs, a, target):  # of a minibatch
        return regression_loss(at(pi(obs), a), target).mean()

    def value_loss(obs, V_hat):
        return 0.5 * (V(obs) - V_hat).square().mean()  # Eq. 53

    mode = "reduce-overhead" if device.type == "cuda" else "default"  # the former: CUDA graphs
    run_choose, run_policy_loss = (
        torch.compile(f, fullgraph=True, mode=mode) if args.compile else f
        for f in (choose, policy_loss))  # an evaluation, of another batch, keeps act
    run = Run(args, pi=pi, V=V, adam_pi=adam_pi, adam_V=adam_V)
    run.evaluate(act)  # with --evaluate, or if a signal interrupted the one that is due here
    s = envs.reset(run.seeds(b"games", N))
    while run.step < args.total_timesteps and not STOP and not args.evaluate:  # STOP: signals
        # rollout: T steps with pi_old
        torch.manual_seed(run.seeds(b"noise")[0])  # anew, so that there is no state to save
        steps = []
        for noise in torch.empty(T, N, A, device=device).exponential_():
            obs, (log_pi, a) = s, map(torch.clone, run_choose(s, noise))  # or they are overwritten
            envs.send(a)
            s, r, terminated, truncated, last = envs.recv()
            r = r.sign()  # (N,)
            if last is not None:  # time limit: s is already a new game's, so add gamma V(last)
                r[truncated] += args.gamma * V(last).detach()
            steps.append((obs, a, log_pi, r, (terminated | truncated).float()))
        obs, a, log_pi_old, r, done = map(torch.stack, zip(*steps))  # (T, N, ...)

        # the step in Q; all that is called old is of the parameters before the update
        with torch.no_grad():
            V_old = torch.cat([V(obs), V(s[None])])  # (T+1, N)
        KL_old = kl_divergence(log_pi_old, log_pi_bar)  # (T, N)
        delta = td_errors(r, KL_old, done, V_old, tau, args.gamma)
        Delta = advantages(delta, done, args.gamma, args.n_step)
        V_hat = V_old[:-1] + Delta  # Eq. 54
        log_ratio_old = at(log_pi_old - log_pi_bar, a)
        A_t = q_step(Delta, log_ratio_old, KL_old, tau)
        obs, a, log_pi_old, log_ratio_old, V_hat, A_t = (
            x.flatten(0, 1) for x in (obs, a, log_pi_old, log_ratio_old, V_hat, A_t))  # (B, ...)

        # natural gradient, where one is wanted, and eps
        left = max(0.0, 1 - run.step / args.schedule_timesteps)  # share of the schedule
        measured = args.measure_every and (run.step // B + 1) % args.measure_every == 0
        solved = args.solver == "cg" or args.target_kl or measured
        if solved:
            x, times, cg_residual, seconds = solve(pi, obs, a, A_t, args)
            Jx = times(x)  # (B, A)
            xFx = all_action_fisher(log_pi_old, Jx, Jx)
        if args.target_kl:
            eps = eps_for_kl(args.target_kl, tau, xFx)  # no decay: it holds kl_natural constant
        else:
            eps = torch.tensor(args.eps * left, device=device)

        # policy step: fit log pi to its target, the same fit as Q to Q_eps: damped_q_loss
        theta_old, lr = flat(pi), args.learning_rate * left
        target = log_pi_target(at(log_pi_old, a), A_t, eps, tau)  # (B,)
        if args.solver == "cg":
            L_policy = regression_loss(at(log_pi_old, a), target).mean()  # before the step
            move(pi, eps / tau * x)  # Eq. 66, 67
        else:
            adam_pi.param_groups[0]["lr"] = lr
            L_policy = fit(run_policy_loss, adam_pi, (obs, a, target), args.passes, args)
        with torch.no_grad():
            log_pi_new = pi(obs)  # (B, A)

        # value step: fit V on its own
        adam_V.param_groups[0]["lr"] = args.value_learning_rate * left
        L_value = fit(value_loss, adam_V, (obs, V_hat), args.value_passes, args)
        run.step += B

        # log, evaluate, save, each when it is due
        Q_before, Q_after = (  # the damped Q loss; V_old is in both Q and left out
            damped_q_loss(0.0, at(log_pi - log_pi_bar, a), 0.0, log_ratio_old, A_t, eps, tau).mean()
            for log_pi in (log_pi_old, log_pi_new))
        moved = mean_kl(log_pi_old, log_pi_new)
        groups = [dict(  # a row has the means of each group
            policy_loss=L_policy, value_loss=L_value,  # mean over minibatches; cg: before the step
            entropy=-kl_divergence(log_pi_old, 0.0).mean(), V=V_old[:T].mean(), V_hat=V_hat.mean(),
            q_loss=Q_after, residual=ratio(Q_after, Q_before),  # after / before; 0 if eps is 0
            eps=eps, kl_moved=moved)]  # KL[pi_old || pi_new] of the policy step, nats
        if solved:
            groups += [dict(
                cg_residual=cg_residual, cg_seconds=eps.new_tensor(seconds),  # of one solution
                kl_natural=quadratic_kl(eps, tau, xFx))]  # of the step eps / tau x, taken or not
        if measured:  # the step that was taken, d, against eps / tau x
            d = flat(pi) - theta_old
            Jd = times(d)
            dFx, dFd = (all_action_fisher(log_pi_old, Jd, Jv) for Jv in (Jx, Jd))
            groups += [dict(
                cosine=ratio(d @ x, d.norm() * x.norm()),
                cosine_fisher=ratio(dFx, dFd.sqrt() * xFx.sqrt()),  # however pi is parameterized
                norm_ratio=ratio(d.norm(), eps / tau * x.norm()),
                kl_measured=moved, kl_quadratic=0.5 * dFd)]  # of d, the latter to second order
        run.log(envs, *groups, learning_rate=lr, **dict.fromkeys(MEASURED, math.nan))
        run.evaluate(act)
        if run.save():  # new games, as in a run resumed from here: the two are equal
            s = envs.reset(run.seeds(b"games", N))

def fit(loss, adam, data, passes, args):
    """Passes of Adam over a batch, each in a new order; returns the mean of the losses, ()."""
    losses = []
    for _ in range(passes):
        for i in torch.randperm(len(data[0])).to(data[0].device).split(args.minibatch_size):
            losses.append(descend(loss(*(x[i] for x in data)), adam, args.max_grad_norm))
    return torch.stack(losses).mean()

def descend(L, adam, max_grad_norm):
    """A step of Adam on the loss L; returns its value, cloned as a compiled loss overwrites it."""
    adam.zero_grad()
    L.backward()
    nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], max_grad_norm)
    adam.step()
    return L.detach().clone()

def flat(net):
    """A copy of its parameters in one row, (P,)."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])

def unflat(net, v):
    """A row v (P,) cut into the shapes of the parameters, by name."""
    named = dict(net.named_parameters())
    parts = v.split([p.numel() for p in named.values()])
    return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}

@torch.no_grad()
def move(net, step):
    """Adds a step (P,) to the parameters."""
    for p, part in zip(net.parameters(), unflat(net, step).values()):
        p.add_(part)

@torch.no_grad()
def solve(pi, obs, a, A_t, args):
    """The natural gradient x (P,) of a batch, J.times at theta_old, residual, wall time in s."""
    def log_pi_of(theta):
        return torch.func.functional_call(pi, unflat(pi, theta), (obs,))

    began = clock(obs.device)
    J = jacobian(log_pi_of, flat(pi), a)
    x, residual = natural_gradient(J, A_t, args.damping, args.cg_iterations)
    return x, J.times, residual, clock(obs.device) - began

def clock(device):
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()

def mean_kl(log_pi_old, log_pi_new):
    """Mean KL[pi_old || pi_new], (). In float32 pi sums to 1 up to 1e-7, which counted as KL."""
    return kl_divergence(*(x.double().log_softmax(-1) for x in (log_pi_old, log_pi_new))).mean()

# === network ===
class Network(nn.Module):
    """log pi of n actions, or with n = 1 V, on the trunk of Mnih et al. (2015), no padding."""
    def __init__(self, n):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(True),  # True: in place
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(True),
            nn.Conv2d(64, 64, 3), nn.ReLU(True), nn.Flatten(),
            nn.Linear(3136, 512), nn.ReLU(True))
        self.head = nn.Linear(512, n)
        for layer in (m for m in self.modules() if hasattr(m, "weight")):  # as the authors' A2C
            nn.init.orthogonal_(layer.weight, 1 if layer is self.head else math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, obs):  # (..., 4, 84, 84) uint8 -> log pi(. | s) (..., A), or V(s) (...)
        x = obs.flatten(end_dim=-4).contiguous(memory_format=torch.channels_last)
        y = self.head(self.trunk(x.float().div_(255))).unflatten(0, obs.shape[:-3])  # (..., n)
        return y.squeeze(-1) if y.shape[-1] == 1 else y.log_softmax(-1)

# === shared: environment and run ===
FREE = {"total_timesteps", "device", "threads", "compile", "eval_every", "eval_games",
        "eval_epsilon", "resume", "evaluate", "runs_dir", "tensorboard"}  # may change on --resume
STOP = []  # signals that asked the run to save and end
SCRIPT, CHECKPOINT = Path(__file__), f"{Path(__file__).stem}.pt"

class Atari:
    """N games stepped together. A lost life ends the learner's episode, not the game."""
    def __init__(self, args, num_envs):
        self.envs = gym.make_vec(
            args.env_id, num_envs, "vector_entry_point", num_threads=args.threads,
            autoreset_mode=gym.vector.AutoresetMode.SAME_STEP, reward_clipping=False,
            max_num_frames_per_episode=args.max_episode_frames,
            repeat_action_probability=args.sticky,  # the emulator's own default is 0.25
            life_loss_info=True)  # episodic_life=True would restart the game at every lost life
        self.n_actions, self.device = int(self.envs.single_action_space.n), args.device

    def reset(self, seeds):
        """Starts new games on (N,) seeds; returns obs (N, 4, 84, 84) uint8."""
        obs, info = self.envs.reset(seed=seeds)
        self.frame, self.score, self.length = info["episode_frame_number"], *np.zeros((2, len(obs)))
        self.ended = []  # games: (environment, score, length in agent steps)
        return torch.from_numpy(obs).to(self.device)

    def send(self, actions):
        """Starts a step with (N,) actions, in threads of the emulator; recv() must follow."""
        actions = actions.cpu().numpy()
        assert 0 <= actions.min() and actions.max() < self.n_actions  # the emulator would hang
        self.envs.send(actions)

    def recv(self):
        """Ends a step: obs, r, terminated, truncated (N, ...), final obs of cut games or None."""
        obs, r, terminated, truncated, info = self.envs.recv()
        self.score, self.length = self.score + r, self.length + 1
        frame = info["episode_frame_number"]  # 4 more than before, or a new game has begun
        over, self.frame = truncated | (frame != self.frame + 4), frame
        truncated &= ~terminated  # where a life was lost in that step nothing follows anyway
        self.ended += [(i, *map(float, (self.score[i], self.length[i]))) for i in over.nonzero()[0]]
        self.score[over], self.length[over] = 0, 0
        last = info["final_obs"][truncated] if truncated.any() else None  # other rows are garbage
        arrays = obs, r.astype(np.float32), terminated, truncated, last
        return [x if x is None else torch.from_numpy(x).to(self.device) for x in arrays]

class Run:
    """A run in its folder. step is in agent steps; parts are the networks, optimizers, ..."""
    def __init__(self, args, **parts):
        self.args, self.parts, self.last = args, parts, dict(log=0, eval=0, save=0)  # steps of them
        self.step, self.wall, self.scores, self.sums = 0, 0.0, [], {}
        self.sizes = {"metrics.csv": 0, "eval.csv": 0}  # of the logs, in bytes
        torch.set_num_threads(args.threads or torch.get_num_threads())
        name = f"{args.env_id[4:-3]}__{SCRIPT.stem}__seed{args.seed}__%Y%m%d-%H%M%S"
        self.folder = Path(args.evaluate or args.resume or Path(args.runs_dir, time.strftime(name)))
        if args.evaluate or args.resume:
            saved = torch.load(self.folder / CHECKPOINT, args.device, weights_only=True)
            vars(self).update(saved["counts"])
            for name, part in parts.items():
                part.load_state_dict(part.state_dict() | saved[name])
        self.began, self.mark = time.monotonic() - self.wall, (self.step, time.monotonic())
        if args.evaluate:
            return
        self.folder.mkdir(parents=True, exist_ok=bool(args.resume))
        for log, size in self.sizes.items():  # rows after the checkpoint are cut
            with open(self.folder / log, "ab") as f:
                assert f.tell() >= size, f"{f.name} has lost rows"
                f.truncate(size)
        about = dict(args=vars(args), command=sys.argv, time=time.ctime(), python=sys.version,
                     commit=sh(f'git -C "{SCRIPT.parent}" describe --always --dirty'),
                     hardware=sh("nproc --all; grep -m1 name /proc/cpuinfo; nvidia-smi -L 2>&-"),
                     **{m.__name__: m.__version__ for m in (torch, np, gym, ale_py)})
        (self.folder / f"args{self.step or ''}.json").write_text(json.dumps(about, indent=1))
        (self.folder / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
        if 0 < args.save_every < args.num_envs * args.max_episode_frames // 4:
            print("warning: --save-every restarts the games before one of full length can end")
        print(f'{args.total_timesteps:,} agent steps on {args.device}, schedules end at '
              f'{args.schedule_timesteps:,}; after a stop: --resume "{self.folder}"')

    def seeds(self, purpose, n=1):
        """(n,) seeds of 31 bits for this step and a purpose; seed + k would be other runs', too."""
        return np.random.SeedSequence([self.args.seed, self.step, *purpose]).generate_state(n) >> 1

    def due(self, what):
        """Whether a row, an evaluation or a save is due; at the end each of them is."""
        every, last = getattr(self.args, f"{what}_every"), self.last[what]
        end = self.step >= self.args.total_timesteps
        return self.step > last and bool(end or every and self.step // every > last // every)

    def log(self, envs, *groups, **columns):
        """Adds up groups, dicts of 0-dim tensors; if due, a row of metrics.csv with their means."""
        for terms in groups:
            old, n = self.sums.get(tuple(terms), (0.0, 0))
            self.sums[tuple(terms)] = old + torch.stack([*terms.values()]).detach().double(), n + 1
        self.scores, envs.ended = (self.scores + [game[1] for game in envs.ended])[-100:], []
        if self.due("log"):
            means = {k: x for names, (total, n) in self.sums.items()
                     for k, x in zip(names, (total / n).tolist())}
            if not all(map(math.isfinite, means.values())):
                raise FloatingPointError(f"not finite by step {self.step}: {means}")
            score, self.sums = np.mean(self.scores) if self.scores else math.nan, {}  # unclipped
            sps = (self.step - self.mark[0]) / (time.monotonic() - self.mark[1])  # agent steps/s
            left = (self.args.total_timesteps - self.step) / sps / 60 if means else math.nan
            self.write("log", "metrics.csv", score=score, sps=sps, **(columns | means))
            print(f"step {self.step:,}, score {score:.1f}, {sps:.0f} steps/s, {left:.0f} min left"
                  .replace("nan", "-"), end="\r" if sys.stdout.isatty() else "\n", flush=True)

    def write(self, what, log, **row):  # to a CSV, and to TensorBoard if it is on
        self.last[what], self.mark = self.step, (self.step, time.monotonic())
        row = dict(step=self.step, wall_time=time.monotonic() - self.began, **row)  # seconds
        with open(self.folder / log, "a") as f:
            f.write("" if f.tell() else ",".join(row) + "\n")
            f.write(",".join(f"{x:.9g}" for x in row.values()) + "\n")
        for name, x in row.items() if self.args.tensorboard else ():
            self.board.add_scalar(f"{log[:-4]}/{name}", x, self.step)

    def evaluate(self, act):
        """If due, plays one full game in each of --eval-games environments; logs raw scores."""
        n, games = self.args.eval_games, {}
        if not n or not (self.args.evaluate or self.due("eval")):
            return
        envs = Atari(self.args, n)
        obs = envs.reset(self.seeds(b"evaluation", n))
        torch.manual_seed(self.seeds(b"evaluation noise")[0])
        while len(games) < n:
            envs.send(act(obs, torch.empty(n, envs.n_actions, device=obs.device).exponential_()))
            obs, *_ = envs.recv()
            games = {i: game for i, *game in reversed(envs.ended)}  # the first of each
            if STOP:
                return  # it stays due
        score, length = np.array([*games.values()]).T
        if not self.args.evaluate:
            self.write("eval", "eval.csv", games=n, score_mean=score.mean(), score_std=score.std(),
                       score_min=score.min(), score_max=score.max(), length_mean=length.mean())
        print(f"step {self.step:,}: score {score.mean():.1f} +- {score.std():.1f} in {n} games")

    def save(self):
        """Writes the checkpoint if due or on a signal. Returns whether to start new games."""
        if not self.due("save") and not STOP:
            return False
        self.last["save"], self.wall = self.step, time.monotonic() - self.began
        self.sizes = {log: (self.folder / log).stat().st_size for log in self.sizes}
        counts = {k: getattr(self, k) for k in ("step", "wall", "last", "scores", "sums", "sizes")}
        state = dict(args=vars(self.args), counts=counts)
        for name, part in self.parts.items():  # an optimizer's groups hold flags of this device
            state[name] = {k: x for k, x in part.state_dict().items() if k != "param_groups"}
            if not all(x.isfinite().all() for x in getattr(part, "parameters", tuple)()):
                raise FloatingPointError(f"a parameter of {name} is not finite by step {self.step}")
        torch.save(state, self.folder / f"{CHECKPOINT}.new")
        os.replace(self.folder / f"{CHECKPOINT}.new", self.folder / CHECKPOINT)
        return self.step < self.args.total_timesteps and not STOP

def main(Args, train):
    """The command line; with --resume and --evaluate, flags not given keep the run's values."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup: ignored; a second signal kills
            signal.signal(number, lambda n, _: (STOP.append(n), signal.signal(n, signal.SIG_DFL)))
    args = tyro.cli(Args, description=__doc__)
    try:
        if folder := args.evaluate or args.resume:
            old = torch.load(Path(folder, CHECKPOINT), "cpu", weights_only=True, mmap=True)["args"]
            args = tyro.cli(Args, default=Args(**old | dict(device=args.device)))
            fixed = {k: x for k, x in old.items() if k not in FREE and x != getattr(args, k)}
            if fixed or args.total_timesteps < old["total_timesteps"]:
                raise ValueError(f"the run has {fixed or old['total_timesteps']}")
        train(args)
    except (ValueError, OSError, AssertionError, FloatingPointError, gym.error.Error) as e:
        print(f"error: {' '.join(sys.argv[1:])}: {e}", file=sys.stderr)
        sys.exit(1 if isinstance(e, FloatingPointError) else 2)
    sys.exit(128 + STOP[0] if STOP else 0)
# === end shared ===

if __name__ == "__main__":
    main(Args, train)
