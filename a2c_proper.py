"""A2C with the proper entropy-regularized policy gradient: the regularizer is in the returns.

  Paper:   Schulman, Chen, Abbeel (2017), Equivalence Between Policy Gradients and Soft Q-Learning,
           arXiv:1704.06440, section 6.1, the arm "EntRL" of Figure 1. Equations 36, 52-54, 80 and
           84-86; 52, 54 and 80 are misprinted (EQUATIONS.md) and stand here corrected.
  Train:   python a2c_proper.py --env-id ALE/Pong-v5 --total-timesteps 10000000
  Expect:  a Pong score of 17 to 20, as published for A2C; README.md has what was measured here.
  Resume:  python a2c_proper.py --resume runs/Pong__a2c_proper__seed1__20260101-120000
  Shapes:  T steps of N environments, A actions. s_t is a stack of 4 frames, 84 x 84, uint8.
  Symbols: pi_bar is the paper's reference policy (a pi with an overline), tau its temperature,
           Delta_t the n-step advantage, V_hat_t the value target, c the weight of the value loss.
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
from typing import Literal

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

def n_step_returns(r, done, V_n, gamma):
    """sum_d gamma^d r_{t+d} + gamma^n V(s_{t+n}) of Eq. 54 for any r; r, done (T, N), V_n (N,)."""
    R, returns = V_n, []  # all sums end with the rollout: n is T at the first step, 1 at the last
    for t in reversed(range(len(r))):
        R = r[t] + gamma * (1 - done[t]) * R
        returns.append(R)
    return torch.stack(returns[::-1])

def losses(log_pi, V, a, r, done, V_n, log_pi_bar, tau, gamma, c):
    """L of Eq. 86, to minimize, and its terms by name, from a rollout of the current policy.

    log_pi (T, N, A) and V (T, N) of s_t; a (T, N) int64; r (T, N) clipped, plus gamma V(last) where
    the time limit cut; done (T, N), 1 at end or cut, else 0; V_n (N,) of s_{t+n}. log_pi_bar (A,)
    or (): 0 pays the entropy of pi, -log A charges its KL from uniform. 0 adds the constant
    tau log A to every r_t, which in games that end rewards staying alive.
    """
    log_pi_a = log_pi.gather(-1, a.unsqueeze(-1)).squeeze(-1)  # (T, N) log pi(a_t | s_t)
    KL = kl_divergence(log_pi, log_pi_bar)  # (T, N) KL_t
    with torch.no_grad():  # returns and advantages are held fixed
        r = r - tau * KL  # Eq. 80: every KL_{t+d} is in the returns, d = 0 included
        V_hat = n_step_returns(r, done, V_n, gamma)  # Eq. 54
        Delta = V_hat - V  # Delta_t = sum_d gamma^d delta_{t+d}, Eq. 36 and 54
    L_policy = (-log_pi_a * Delta + tau * KL).mean()  # Eq. 84; minus its gradient is Eq. 52, 80
    L_value = 0.5 * (V - V_hat).square().mean()  # Eq. 53, 85
    L = L_policy + c * L_value  # Eq. 86
    entropy = -kl_divergence(log_pi, 0.0).mean()
    return L, dict(loss=L, policy_loss=L_policy, value_loss=L_value, entropy=entropy, V=V.mean(),
                   V_hat=V_hat.mean())

def sample(log_pi, noise):
    """a ~ pi by the Gumbel-max rule, (..., A) -> (...) int64; noise ~ Exp(1), (..., A)."""
    return (log_pi - noise.log()).argmax(-1)

# === flags ===
@dataclass
class Args:
    env_id: str = "ALE/Pong-v5"  # game, ALE/<Game>-v5
    total_timesteps: int = 80_000_000  # agent steps over all environments, 4 frames each
    schedule_timesteps: int = 0  # agent steps until the learning rate is 0; 0: total-timesteps
    tau: float = 0.01  # temperature of the regularizer, in units of clipped reward
    regularizer: Literal["entropy", "kl"] = "entropy"  # log pi_bar = 0, or -log|A| (uniform)
    gamma: float = 0.99  # discount per agent step
    num_envs: int = 16  # environments stepped together (N)
    num_steps: int = 5  # agent steps per environment and update (n, T)
    learning_rate: float = 7e-4  # RMSProp step size at the start, decays linearly
    vf_coef: float = 0.5  # c, weight of the value loss, which is half the squared error
    max_grad_norm: float = 0.5  # largest norm of the gradient, all parameters together
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

# === algorithm ===
def train(args):
    """Trains for args.total_timesteps agent steps, or with args.evaluate only plays.

    Raises FloatingPointError, at a row or a save, if losses or parameters are not finite.
    """
    torch.manual_seed(args.seed)
    device, T, N = torch.device(args.device), args.num_steps, args.num_envs
    envs = Atari(args, N)
    A = envs.n_actions
    net = ActorCritic(A).to(device, memory_format=torch.channels_last)
    optimizer = RMSpropTF(net.parameters(), args.learning_rate)
    log_pi_bar = {"entropy": 0.0, "kl": -math.log(A)}[args.regularizer]  # pays entropy or costs KL

    @torch.no_grad()
    def act(obs, noise):  # (N, 4, 84, 84), (N, A) -> (N,)
        return sample(net(obs)[0], noise)

    def loss(obs, a, r, done, s_n):
        with torch.no_grad():
            _, V_n = net(s_n)  # (N,) V(s_{t+n})
        log_pi, V = net(obs)  # (T, N, A), (T, N)
        return losses(log_pi, V, a, r, done, V_n, log_pi_bar, args.tau, args.gamma, args.vf_coef)

    mode = "reduce-overhead" if device.type == "cuda" else "default"  # the former: CUDA graphs
    run_act, run_loss = (torch.compile(f, fullgraph=True, mode=mode) if args.compile else f
                         for f in (act, loss))  # evaluations, of another batch size, stay plain
    run = Run(args, net=net, optimizer=optimizer)
    run.evaluate(act)  # with --evaluate, or if a signal interrupted the one that is due here
    s = envs.reset(run.seeds(b"games", N))
    while run.step < args.total_timesteps and not STOP and not args.evaluate:  # STOP: signals
        # rollout: T steps with the current policy
        torch.manual_seed(run.seeds(b"noise")[0])  # anew, so that there is no state to save
        steps = []
        for noise in torch.empty(T, N, A, device=device).exponential_():
            obs, a = s, run_act(s, noise).clone()  # cloned, as the next call may overwrite it
            envs.send(a)
            s, r, terminated, truncated, last = envs.recv()
            r = r.sign()  # (N,)
            if last is not None:  # time limit: s is already a new game's, so add gamma V(last)
                r[truncated] += args.gamma * net(last)[1].detach()
            steps.append((obs, a, r, (terminated | truncated).float()))
        obs, a, r, done = map(torch.stack, zip(*steps))  # (T, N, 4, 84, 84), then (T, N)

        # targets, loss, step
        L, terms = run_loss(obs, a, r, done, s)
        optimizer.zero_grad()
        L.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), args.max_grad_norm)  # before clipping
        lr = args.learning_rate * max(0.0, 1 - run.step / args.schedule_timesteps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        run.step += T * N

        # log, evaluate, save, each when it is due
        run.log(envs, dict(terms, grad_norm=norm), learning_rate=lr)  # terms: means since the row
        run.evaluate(act)
        if run.save():  # new games, as in a run resumed from here: the two are equal
            s = envs.reset(run.seeds(b"games", N))

# === shared: network and optimizer ===
class ActorCritic(nn.Module):
    """Policy and value head on the trunk of Mnih et al. (2015), no padding: 3136 features."""
    def __init__(self, n_actions):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(True),  # True: in place
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(True),
            nn.Conv2d(64, 64, 3), nn.ReLU(True), nn.Flatten(),
            nn.Linear(3136, 512), nn.ReLU(True))
        self.pi, self.V = nn.Linear(512, n_actions), nn.Linear(512, 1)
        for layer in (m for m in self.modules() if hasattr(m, "weight")):  # as the authors' A2C
            nn.init.orthogonal_(layer.weight, 1 if layer in (self.pi, self.V) else math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, obs):  # (..., 4, 84, 84) uint8 -> log pi(. | s) (..., A), V(s) (...)
        x = obs.flatten(end_dim=-4).contiguous(memory_format=torch.channels_last)
        h = self.trunk(x.float().div_(255)).unflatten(0, obs.shape[:-3])  # (..., 512)
        return self.pi(h).log_softmax(-1), self.V(h).squeeze(-1)

class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 computed it: mean square from one, epsilon inside the root."""
    def __init__(self, params, lr, decay=0.99, eps=1e-5):
        super().__init__(params, dict(lr=lr, decay=decay, eps=eps))
        for p in self.param_groups[0]["params"]:  # torch's starts at 0: its first steps are huge
            self.state[p]["mean_square"] = torch.ones_like(p)

    @torch.no_grad()
    def step(self):
        d, eps, lr = (self.param_groups[0][name] for name in ("decay", "eps", "lr"))
        for p in self.param_groups[0]["params"]:
            mean_square = self.state[p]["mean_square"].mul_(d).addcmul_(p.grad, p.grad, value=1 - d)
            p.addcdiv_(p.grad, (mean_square + eps).sqrt_(), value=-lr)
# === end shared ===

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
