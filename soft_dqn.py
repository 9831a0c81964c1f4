"""Soft Q-learning against standard DQN: the backup is a log-sum-exp in place of the maximum.

  Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
           arXiv:1704.06440, sections 3.5 and 6.2, Figure 2. Equations 29, 30, 39, 44-46, 81-83;
           46, 82 and 83 are misprinted in the text and stand here corrected.
  Train:   python soft_dqn.py --env-id ALE/Pong-v5  # takes 7 GB; over a day on two CPU cores
  Arms:    the six of Figure 2: --backup hard, alone and with --n-step 5, and --backup soft-entropy
           and --backup soft-kl, each with --tau 0.1 and --tau 0.01
  Expect:  a Pong score of about 20, as published for DQN; README.md has what was measured.
  Resume:  python soft_dqn.py --resume runs/Pong__soft_dqn__seed1__20260101-120000
  Shapes:  B windows of n steps a minibatch, from N environments; A actions, C slots of memory.
  Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature,
           V_Q(s) the soft maximum of Q(s, .), y_t the target of Q(s_t, a_t).
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
from typing import Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep
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
    done: torch.Tensor  # (n, B) 1 where a life or the game was lost: nothing follows, else 0
    next_obs: torch.Tensor  # (n, B, 4, 84, 84) s_{t+1} .. s_{t+n}; after a done they do not count

def soft_value(Q, log_pi_bar, tau):
    """V_Q(s) = tau log sum_a pi_bar(a|s) exp(Q(s, a) / tau), Eq. 29; (..., A) -> (...).

    Eq. 82 has log_pi_bar = -log A (KL), Eq. 83 has 0 (entropy); tau = 0 is the limit of both, the
    maximum of Eq. 81. They are printed without the first tau, and then diverge for tau < gamma.
    """
    top = Q.max(-1).values
    if tau == 0:
        return top  # Eq. 81
    return top + tau * ((Q - top.unsqueeze(-1)) / tau + log_pi_bar).logsumexp(-1)  # Eq. 82, 83

def boltzmann(Q, log_pi_bar, tau):
    """log pi(a|s) = log pi_bar + (Q - V_Q) / tau, Eq. 30; normalized however large Q / tau is."""
    return ((Q - Q.max(-1, keepdim=True).values) / tau + log_pi_bar).log_softmax(-1)

def kl_divergence(log_pi, log_pi_bar):
    """KL[pi || pi_bar](s), (..., A) -> (...). With log_pi_bar = 0 it is minus the entropy of pi."""
    return (log_pi.exp() * (log_pi - log_pi_bar)).sum(-1)

def targets(r, done, Q, log_pi_bar, tau, gamma):
    """y_t = r_t + sum_{0<d<n} gamma^d (r_{t+d} - tau KL_{t+d}) + gamma^n V_Q(s_{t+n}), Eq. 46.

    (n, B) -> (B,); Q (n, B, A) is the target network's at s_{t+1} .. s_{t+n}, KL_{t+d} that of its
    Boltzmann policy. s_t has none: Q(s_t, a_t) is what follows once a_t is chosen. n = 1 is Eq. 45.
    With tau = 0 that policy is the greedy one and no KL is charged: Q of s_{t+n}, (1, B, A), will
    do. After a done nothing follows.

    n > 1 is biased off-policy: Eq. 46 is an expectation over a_{t+1} .. a_{t+n-1} drawn from that
    policy, and the memory holds those of older and more random ones. n = 1 is not biased: a_t is
    given, and V_Q sums over all actions after it.
    """
    KL = kl_divergence(boltzmann(Q, log_pi_bar, tau), log_pi_bar) if tau else torch.zeros_like(r)
    y = soft_value(Q, log_pi_bar, tau)[-1]  # (B,) V_Q(s_{t+n}); its gamma^n is printed gamma^{t+n}
    for d in reversed(range(len(r))):
        y = r[d] + gamma * (1 - done[d]) * y
        y = y - tau * KL[d - 1] if d > 0 else y  # Q[d - 1] belongs to s_{t+d}
    return y

def loss(Q, a, y, kind):
    """Eq. 44, or Huber's loss as the authors' DQN: the same up to an error of 1, linear beyond."""
    Q_a = Q.gather(-1, a.unsqueeze(-1)).squeeze(-1)  # (B,) Q(s_t, a_t)
    if kind == "square":
        return 0.5 * (Q_a - y).square().mean()  # Eq. 44
    return nn.functional.huber_loss(Q_a, y)

def epsilon_greedy(Q, epsilon, noise):
    """The best action, or with probability epsilon any; (..., A) -> (...); noise ~ Exp(1)."""
    smallest, any_action = noise.min(-1)  # independent of each other
    u = 1 - (-Q.shape[-1] * smallest).exp()  # uniform in [0, 1], as smallest ~ Exp(A)
    return torch.where(u < epsilon, any_action, Q.argmax(-1))

def boltzmann_sample(Q, tau, noise):
    """a ~ pi of Eq. 30 by the Gumbel-max rule, (..., A) -> (...); noise ~ Exp(1), (..., A)."""
    return (boltzmann(Q, 0.0, tau) - noise.log()).argmax(-1)

# === flags ===
@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 10_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until epsilon is 0.01; 0: total-timesteps
    backup: Literal["hard", "soft-entropy", "soft-kl"] = "soft-entropy"  # Eq. 81, 83 or 82
    tau: float = 0.1  # temperature of soft backup and boltzmann, in units of clipped reward
    n_step: int = 1  # rewards before the bootstrap (n); above 1 biased off-policy
    exploration: Literal["epsilon-greedy", "boltzmann"] = "epsilon-greedy"  # how training acts
    eval_epsilon: float = 0.01  # epsilon of evaluations
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 8  # environments stepped together (N)
    buffer_size: int = 1_000_000  # frames in the replay memory, 7 kB each, over all environments
    learning_starts: int = 50_000  # agent steps before the first update
    batch_size: int = 32  # transitions per update (B)
    train_frequency: int = 4  # agent steps per update, whatever num-envs is
    target_network_frequency: int = 40_000  # agent steps between copies to the target network
    learning_rate: float = 1e-4  # Adam step size
    loss: Literal["huber", "square"] = "huber"  # square is Eq. 44
    max_grad_norm: float = 10.0  # largest norm of the gradient of each weight and bias by itself
    save_replay: bool = False  # save the memory, too; else resuming first plays learning-starts
    save_every: int = 250_000  # agent steps between checkpoints, each with new games; 0: at the end
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

# === algorithm ===
TERMS = "loss", "max_Q", "V_Q", "entropy", "grad_norm"

def train(args):
    """Trains for args.total_timesteps agent steps, or with args.evaluate only plays.

    Raises ValueError on flags that do not fit, FloatingPointError on numbers that are not finite.
    """
    check(args)
    torch.manual_seed(args.seed)
    device, N, n = torch.device(args.device), args.num_envs, args.n_step
    envs = Atari(args, N)
    A = envs.n_actions
    net, target = (QNetwork(A).to(device, memory_format=torch.channels_last) for _ in range(2))
    target.load_state_dict(net.state_dict())
    optimizer = AdamTF(net.parameters(), args.learning_rate)
    tau = 0.0 if args.backup == "hard" else args.tau  # with log_pi_bar it decides on the backup
    log_pi_bar = -math.log(A) if args.backup == "soft-kl" else 0.0

    @torch.no_grad()
    def act(obs, noise, epsilon=args.eval_epsilon, exploration="epsilon-greedy"):
        Q = net(obs)  # (N, 4, 84, 84) -> (N, A)
        if exploration == "boltzmann":
            return boltzmann_sample(Q, args.tau, noise)  # (N,)
        return epsilon_greedy(Q, epsilon, noise)  # (N,)

    def targets_and_loss(obs, a, r, done, next_obs):  # the fields of a Batch
        with torch.no_grad():
            Q_next = target(next_obs if tau else next_obs[-1:])  # (n, B, A), or (1, B, A) will do
            y = targets(r, done, Q_next, log_pi_bar, tau, args.gamma)  # (B,)
        Q = net(obs)  # (B, A)
        L, Q = loss(Q, a, y, args.loss), Q.detach()
        max_Q, V_Q = Q.max(-1).values, soft_value(Q, log_pi_bar, tau)
        entropy = -kl_divergence(boltzmann(Q, 0.0, max(args.tau, 1e-6)), 0.0)
        return L, (L, max_Q.mean(), V_Q.mean(), entropy.mean())  # as TERMS

    mode = "reduce-overhead" if device.type == "cuda" else "default"  # the former: CUDA graphs
    run_act, run_loss = (torch.compile(f, fullgraph=True, mode=mode) if args.compile else f
                         for f in (act, targets_and_loss))  # evaluations, of another batch: act
    parts = dict(net=net, target=target, optimizer=optimizer)
    if args.evaluate:
        return Run(args, **parts).evaluate(act)
    memory = Replay(N, math.ceil(args.buffer_size / N), device)
    run = Run(args, **parts, **(dict(memory=memory) if args.save_replay else {}))
    going = run.step < args.total_timesteps and not args.save_replay
    refill = min(run.step, args.learning_starts) * going  # steps that a resumed run plays first
    print(f"learning starts at {args.learning_starts:,}; "
          f"replay memory {memory.frames.nbytes / 1e9:.1f} GB"
          + f", refilled with {refill:,} steps, which do not count" * (refill > 0))
    if args.learning_starts >= args.total_timesteps:
        print(f"warning: nothing is learned in {args.total_timesteps:,} steps")
    run.evaluate(act)  # if a signal interrupted the one that is due here
    s = memory.begin(envs.reset(run.seeds(b"refill" if refill else b"games", N)))
    while run.step < args.total_timesteps and not STOP:  # STOP: signals
        # act: the emulator works while the network learns from what it gave before
        torch.manual_seed(run.seeds((*b"noise", refill))[0])  # anew: there is no state to save
        noise = torch.empty(N, A, device=device).exponential_()
        epsilon = torch.full((), epsilon_at(run.step, args), device=device)  # a float recompiles
        a = run_act(s, noise, epsilon, args.exploration).clone()  # the next call may overwrite it
        envs.send(a)

        # targets, loss, step
        updates, terms = updates_by(run.step + N, args), []
        for _ in range(0 if refill else updates - updates_by(run.step, args)):
            L, values = run_loss(*memory.sample(memory.draw(args.batch_size, n), n))
            optimizer.zero_grad()
            L.backward()
            norm = clip_each_(net.parameters(), args.max_grad_norm)  # before clipping
            optimizer.step()
            terms.append(dict(zip(TERMS, (x.detach().clone() for x in (*values, norm)))))

        # store
        s, r, terminated, truncated, _ = envs.recv()
        memory.add(a, r.sign(), terminated, truncated, s, [game[0] for game in envs.ended])
        if refill:
            envs.ended, refill = [], max(0, refill - N)
            if not refill:
                run.mark = run.step, time.monotonic()  # so that sps is that of training
                s = memory.begin(envs.reset(run.seeds(b"games", N)))
            continue
        run.step += N
        if run.step % args.target_network_frequency < N:
            target.load_state_dict(net.state_dict())

        # log, evaluate, save, each when it is due. TERMS: means over updates; entropy: that of the
        # Boltzmann policy at --tau, also with --backup hard; epsilon: unused if boltzmann explores
        run.log(envs, *terms, **dict.fromkeys(TERMS, math.nan), epsilon=epsilon_at(run.step, args),
                updates=updates, replay_fill=min(1, memory.t / memory.C))
        run.evaluate(act)
        if run.save():  # new games, as on --resume: equal to an unbroken run with --save-replay
            s = memory.begin(envs.reset(run.seeds(b"games", N)))

def check(args):
    """Refuses flags that do not go together."""
    if args.tau < 1e-6 and (args.backup != "hard" or args.exploration == "boltzmann"):
        raise ValueError(f"--tau {args.tau:g}: soft backups and boltzmann take 1e-6 or more")
    least = (2 * args.n_step + 4) * args.num_envs  # so that some n steps lie between cuts
    if min(args.buffer_size, args.learning_starts) < least:
        raise ValueError(f"--buffer-size {args.buffer_size}, --learning-starts "
                         f"{args.learning_starts}: the least is {least} at --n-step {args.n_step}")

def updates_by(step, args):
    """Updates due by an agent step, so that their ratio to steps does not depend on num_envs."""
    return max(0, step // args.train_frequency - args.learning_starts // args.train_frequency)

def epsilon_at(step, args):
    """Linear from 1 to 0.1 in a tenth of the schedule, from there to 0.01 at its end."""
    return float(np.interp(step / args.schedule_timesteps, (0, 0.1, 1), (1, 0.1, 0.01)))

# === replay memory ===
class Replay:
    """The last C steps of N environments, each frame once; stacks of 4 are made when sampled.

    Step t of all environments lies in slot t % C: the newest frame of s_t, a_t, r_t, done_t, the
    age of s_t (frames before it in its game, at most 3), and cut_t: 1 where s_{t+1} is not held, as
    the time limit or a restart cut the game. The newest slot is open: a frame, no action yet.
    """
    def __init__(self, num_envs, capacity, device):
        self.N, self.C, self.t = num_envs, capacity, 0
        frames = np.zeros((capacity, num_envs, 84, 84), np.uint8)  # no RAM before it is written
        self.frames = torch.from_numpy(frames).to(device)
        facts = torch.zeros(4, capacity, num_envs, dtype=torch.int8, device=device)
        self.a, self.r, self.done, self.age = facts
        self.cut = torch.zeros(capacity, num_envs, dtype=torch.bool)  # on the host, for draw()

    def begin(self, obs):
        """New games in all environments: the open step counts as cut. Returns obs."""
        return self.add(0, 0, 0, True, obs, slice(None))

    def add(self, a, r, done, cut, obs, started):
        """Completes the open slot, (N,) each, opens one for obs; a game begins where started."""
        k, new = self.t % self.C, (self.t + 1) % self.C
        self.a[k], self.r[k], self.done[k], self.cut[k] = a, r, done, cut
        self.frames[new], self.age[new] = obs[:, 3], (self.age[k] + 1).clamp(max=3)
        self.age[new, started] = 0
        self.t += 1
        return obs

    def draw(self, B, n):
        """(2, B) steps t and environments, uniform over the windows of n steps without a cut.

        One with a life lost before the cut counts as cut, or deaths would be drawn too often.
        """
        oldest = self.t - self.C + 4 if self.t >= self.C else 0  # whose stack is still held
        for tries in range(1, 100):
            t = torch.randint(oldest, self.t - n + 1, (2 * B * tries,))
            env = torch.randint(self.N, t.shape)
            cut = self.cut[(t + torch.arange(n)[:, None]) % self.C, env].any(0)
            if (~cut).sum() >= B:
                return torch.stack((t, env))[:, ~cut][:, :B]
        raise ValueError(f"--n-step {n}: hardly any {n} steps lie between two cuts of the games")

    def sample(self, indices, n):
        """The Batch of the windows of n steps that start at indices, (2, B) as of draw()."""
        t, env = indices.to(self.frames.device)
        back = torch.arange(3, -1, -1, device=t.device)  # (4,) a stack, oldest frame first
        t = t + torch.arange(n + 1, device=t.device)[:, None]  # (n+1, B)
        at = t % self.C, env
        i = (t[..., None] - back) % self.C * self.N + env[:, None]  # (n+1, B, 4)
        stack = self.frames.flatten(end_dim=1).index_select(0, i.flatten())  # quick on a CPU
        seen = self.age[at][..., None] >= back  # what was before the game is zero
        obs = stack.view(*i.shape, 84, 84) * seen[..., None, None]  # (n+1, B, 4, 84, 84)
        r, done = self.r[at][:-1].float(), self.done[at][:-1].float()
        return Batch(obs[0], self.a[at][0].long(), r, done, obs[1:])

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        vars(self).update(state, cut=state["cut"].cpu())

# === network and optimizer ===
class QNetwork(nn.Module):
    """Q(s, .) on the trunk of Mnih et al. (2015), no padding: 3136 features.

    The authors' A2C does not pad either; their DQN does (7744). Xavier-uniform weights and zero
    biases are those of their DQN.
    """
    def __init__(self, n_actions):
        super().__init__()
        self.Q = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(True),  # True: in place
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(True),
            nn.Conv2d(64, 64, 3), nn.ReLU(True), nn.Flatten(),
            nn.Linear(3136, 512), nn.ReLU(True), nn.Linear(512, n_actions))
        for layer in (m for m in self.Q if hasattr(m, "weight")):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, obs):  # (..., 4, 84, 84) uint8 -> Q(s, .) (..., A)
        x = obs.flatten(end_dim=-4).contiguous(memory_format=torch.channels_last).float()
        return self.Q(x.div_(255)).unflatten(0, obs.shape[:-3])

class AdamTF(torch.optim.Adam):
    """Adam as TensorFlow 1 computed it: epsilon is added to the root before its bias is corrected.

    That is PyTorch's with eps / sqrt(1 - beta2^t) at update t, 32 eps at the first.
    """
    def __init__(self, params, lr, eps=1e-4, fused=True):
        super().__init__(params, lr, fused=fused)
        self.eps, self.t = eps, 0

    def step(self):
        self.t, group = self.t + 1, self.param_groups[0]
        group["eps"] = self.eps / math.sqrt(1 - group["betas"][1] ** self.t)
        super().step()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.t = max((int(x["step"]) for x in self.state.values()), default=0)

def clip_each_(params, max_norm):
    """Clips the gradient of each tensor by its own norm; returns the norm of all before that."""
    norms = []
    for p in params:
        norms.append(p.grad.norm())
        p.grad.mul_(max_norm / norms[-1].clamp(min=max_norm))
    return torch.stack(norms).norm()

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
