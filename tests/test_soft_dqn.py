"""The paper's sections 3.5 and 6.2, numerically; the replay memory against a naive one; runs."""
import copy
import math

import numpy as np
import pytest
import torch

import soft_dqn
from equations.mdp import Problem, power
from exact import MDP
from soft_dqn import AdamTF, Atari, Replay, boltzmann_sample, clip_each_, epsilon_greedy, targets
from util import checkpoint, equal, killed, resumed, rows, tiny, trained

TAU, GAMMA = 0.3, 0.9

# --- the paper, float64 ---
def value(Q, log_pi_bar):
    """V_Q by its other form, Eq. 31: E_pi[Q] - tau KL[pi || pi_bar], pi by Eq. 28."""
    pi = policy(Q, log_pi_bar)
    return (pi * Q).sum(-1) - TAU * (pi * (pi.log() - log_pi_bar)).sum(-1)

def policy(Q, log_pi_bar):
    weights = log_pi_bar.exp() * (Q / TAU).exp()
    return weights / weights.sum(-1, keepdim=True)

def expected_target(mdp, Q, n, behavior, target=targets):
    """E[y_t | s, a] over all paths of n steps that follow, (S, A), through targets()."""
    total, weight = torch.zeros(2, mdp.S, mdp.A)
    for probability, s, a in mdp.trajectories(n, behavior):
        here, after = s[:-1], s[1:]
        y = target(mdp.r[here, a][:, None], mdp.ends[here, a][:, None], Q[after][:, None],
                   mdp.log_pi_bar[after][:, None], TAU, GAMMA)
        total[s[0], a[0]] += probability * y[0]
        weight[s[0], a[0]] += probability
    return total / weight

@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_n_steps_are_equation_46_with_games_that_end_inside_the_window(double, seed, n):
    """On the target's own policy exactly the operator of Eq. 40 and 41, on another one biased."""
    mdp = Problem(seed)
    Q = torch.randn(mdp.S, mdp.A, generator=torch.Generator().manual_seed(seed + 50))
    own = policy(Q, mdp.log_pi_bar)
    exact = power(mdp.T_Q, own, Q, n)
    assert (expected_target(mdp, Q, n, own) - exact).abs().max() < 1e-10
    other = 0.1 * own + 0.9 / mdp.A
    gap = (expected_target(mdp, Q, n, other) - exact).abs().max()
    assert gap < 1e-10 if n == 1 else gap > 1e-3, "the bias that the docstring speaks of"

    def printed(r, done, Q, log_pi_bar, tau, gamma):  # gamma^{t+n} at t = 5
        y, V = targets(r, done, Q, log_pi_bar, tau, gamma), value(Q[-1], log_pi_bar[-1])
        return y + (1 - done).prod(0) * (gamma ** (5 + len(r)) - gamma ** len(r)) * V

    def first_kl(r, done, Q, log_pi_bar, tau, gamma):  # KL_t at d = 0 as well
        kl = tau * (own * (own.log() - mdp.log_pi_bar)).sum(-1)[0]
        return targets(r, done, Q, log_pi_bar, tau, gamma) - kl

    for wrong in (printed, first_kl):
        assert (expected_target(mdp, Q, n, own, target=wrong) - exact).abs().max() > 1e-3

@pytest.mark.parametrize("tau", [0.0, TAU])
@pytest.mark.parametrize("seed", range(3))
def test_targets_are_the_forward_sum_wherever_it_ends(double, seed, tau):
    g = torch.Generator().manual_seed(seed)
    n, B, A = 4, 60, 3
    Q, r = torch.randn(n, B, A, generator=g), torch.randn(n, B, generator=g)
    done = (torch.rand(n, B, generator=g) < 0.25).double()
    log_pi_bar = torch.randn(A, generator=g).log_softmax(-1)
    y = targets(r, done, Q, log_pi_bar, tau, GAMMA)
    V = value(Q, log_pi_bar) if tau else Q.max(-1).values
    pi = policy(Q, log_pi_bar)
    kl = (pi * (pi.log() - log_pi_bar)).sum(-1)
    assert {*done.cumsum(0).gt(0).sum(0).tolist()} == {*range(n + 1)}, "it ends at every step"
    for b in range(B):
        total = 0.0
        for d in range(n):
            total += GAMMA**d * (r[d, b] - (tau * kl[d - 1, b] if d else 0.0))
            if done[d, b]:
                break
        else:
            total += GAMMA**n * V[-1, b]
        assert abs(y[b] - total) < 1e-10
    if not tau:  # Eq. 81: one network pass in place of n
        last, first = (targets(r, done, x, log_pi_bar, tau, GAMMA) for x in (Q[-1:], Q[:1]))
        assert torch.equal(y, last) and (y - first).abs().max() > 0.1

def test_the_printed_soft_targets_diverge_and_the_corrected_converge(double):
    """Q(s) <- r + gamma V_Q(s) on one state: the printed forms answer Q + 1 with gamma / tau."""
    r, tau, gamma = torch.tensor([[0.3, -0.2, 0.1]]), 0.2, 0.9
    for log_pi_bar in (torch.zeros(3), torch.full((3,), -math.log(3))):
        Q = printed = r
        for _ in range(300):
            Q = r + gamma * soft_dqn.soft_value(Q, log_pi_bar, tau)[:, None]
            printed = r + gamma * (printed / tau + log_pi_bar).logsumexp(-1, keepdim=True)
        again = r + gamma * soft_dqn.soft_value(Q, log_pi_bar, tau)[:, None]
        assert (Q - again).abs().max() < 1e-10 and printed.abs().max() > 1e12

def test_large_q_over_tau_is_stable_in_float32():
    Q = torch.tensor([[1e4, 1e4 - 2e-3, -1e4], [-1e4, -1e4, -1e4]], requires_grad=True)
    tau, zero = 1e-3, torch.zeros(3)
    V, log_pi = soft_dqn.soft_value(Q, zero, tau), soft_dqn.boltzmann(Q, zero, tau)
    reference = tau * torch.logsumexp(Q.detach().double() / tau, -1)
    assert (V - reference).abs().max() < 2e-3  # the spacing of float32 at 1e4 is 1e-3
    exact = (Q.detach().double() / tau).log_softmax(-1)
    near = exact > -1e3
    assert ((log_pi - exact)[near]).abs().max() < 1e-5
    assert (log_pi.exp().sum(-1) - 1).abs().max() < 1e-6
    kl = soft_dqn.kl_divergence(log_pi, zero)
    y = targets(torch.ones(2, 2), torch.zeros(2, 2), Q.expand(2, 2, 3), zero, tau, 0.99)
    (V.sum() + kl.sum() + y.sum()).backward()
    assert all(x.isfinite().all() for x in (V, log_pi, kl, y, Q.grad))

@pytest.mark.parametrize("kind", ["square", "huber"])
@pytest.mark.parametrize("backup", ["hard", "entropy", "kl"])
def test_gradient_descent_on_the_loss_finds_the_optimal_q_of_value_iteration(double, backup, kind):
    """Over all transitions of a random MDP, weighted by their probability."""
    mdp, gamma = MDP(3), 0.8
    counts = (100 * mdp.p).round().long()  # of transitions: their mean is one over mdp.p
    mdp.p = counts / counts.sum(-1, keepdim=True)
    tau = 0.0 if backup == "hard" else TAU
    log_pi_bar = torch.tensor(-math.log(mdp.A) if backup == "kl" else 0.0)
    best = torch.zeros(mdp.S, mdp.A)
    for _ in range(500):
        lse = (best / TAU).exp().sum(-1).log() + log_pi_bar
        V = best.max(-1).values if backup == "hard" else TAU * lse
        best = mdp.r + gamma * (1 - mdp.ends) * (mdp.p @ V)
    s, a, s_next = counts.nonzero().repeat_interleave(counts[counts > 0], 0).T
    Q = torch.zeros(mdp.S, mdp.A, requires_grad=True)
    for _ in range(2000):
        y = targets(mdp.r[s, a][None], mdp.ends[s, a][None], Q.detach()[s_next][None], log_pi_bar,
                    tau, gamma)
        L = soft_dqn.loss(Q[s], a, y, kind)
        Q.data -= 3.0 * torch.autograd.grad(L, Q)[0]
    assert L.item() > 0, "the minimum is the mean of different targets"
    assert (Q - best).abs().max() < (1e-3 if kind == "square" else 0.2)

# --- the DQN underneath ---
def test_adam_is_tensorflows_also_after_a_reload(double):
    """Against the formula, with the epsilon that is not corrected; torch.optim.Adam differs."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    lr, m, v, x = 1e-4, 0.0, 0.0, np.zeros(3)
    optimizer, other = AdamTF([p], lr), torch.optim.Adam([q], lr, eps=1e-4)
    rng = np.random.default_rng(0)
    for t in range(1, 200):
        if t in (2, 100):  # as a checkpoint does it, without the groups
            state = copy.deepcopy(optimizer.state_dict()["state"])
            optimizer = AdamTF([p], lr)
            optimizer.load_state_dict(optimizer.state_dict() | dict(state=state))
        g = rng.normal(size=3) * 1e-3
        p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        optimizer.step()
        other.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-4)
        x = x - step
        assert np.abs(p.detach().numpy() - x).max() < 1e-10 * np.abs(step).max()
    assert (p - q).abs().max() > 1e-4

def test_each_tensor_is_clipped_by_its_own_norm():
    params = [torch.nn.Parameter(torch.zeros(k)) for k in (4, 9, 1, 2)]
    for p, scale in zip(params, (1.0, 20.0, 0.0, 10.0)):
        p.grad = torch.full_like(p, scale)
    norm = clip_each_(params, 10.0)
    assert norm.item() == pytest.approx(math.sqrt(4 + 9 * 400 + 2 * 100))
    assert [p.grad.norm().item() for p in params] == pytest.approx([2, 10, 0, 10])

def noise_like(Q, seed=0):
    return torch.empty_like(Q).exponential_(generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("epsilon", [0.2, torch.tensor(0.2)])
def test_exploration_follows_its_policy(epsilon):
    N = 100_000
    Q = torch.tensor([0.1, 0.3, 0.0, -0.2]).repeat(N, 1)
    noise = noise_like(Q)
    for sampled, expected in (
            (epsilon_greedy(Q, epsilon, noise), torch.tensor([0.05, 0.85, 0.05, 0.05])),
            (epsilon_greedy(Q, 5 * epsilon, noise), torch.full((4,), 0.25)),
            (boltzmann_sample(Q, 0.1, noise), (Q[0] / 0.1).softmax(-1))):
        frequency = sampled.bincount(minlength=4) / N
        assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / N)
    assert (epsilon_greedy(Q, 0 * epsilon, noise) == 1).all()

def test_the_actions_are_on_the_last_axis_whatever_stands_before_it():
    g = torch.Generator().manual_seed(5)
    Q, y, a = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3), torch.randint(4, (2, 3))
    for kind in ("huber", "square"):
        parts = [soft_dqn.loss(*x, kind) for x in zip(Q, a, y)]
        assert abs(soft_dqn.loss(Q, a, y, kind) - sum(parts) / 2) < 1e-6
    half = epsilon_greedy(Q.expand(200, 2, 3, 4), 0.5, noise_like(Q.expand(200, 2, 3, 4).clone()))
    best = (half == Q.argmax(-1)).float().mean(0)
    assert half.shape == (200, 2, 3) and sorted(half.unique().tolist()) == [0, 1, 2, 3]
    assert ((best > 0.5) & (best < 0.75)).all() and len(best.unique()) > 1, "each on its own"
    assert torch.equal(boltzmann_sample(Q, 1e-4, noise_like(Q)), Q.argmax(-1))

def test_network_has_xavier_uniform_weights_and_3136_features():
    torch.manual_seed(0)
    net = soft_dqn.QNetwork(6)
    layers = [m for m in net.modules() if hasattr(m, "weight")]
    assert [tuple(m.weight.shape) for m in layers] == [
        (32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]
    for m in layers:
        w = m.weight.detach()
        area = w[0, 0].numel()
        bound = math.sqrt(6 / (area * (w.shape[0] + w.shape[1])))
        assert 0.98 * bound < w.abs().max() <= bound and not m.bias.any()
        assert w.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
    obs = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    assert net(obs).shape == (2, 3, 6)
    assert torch.allclose(net(obs)[1, 2], net.Q(obs[1, 2:].float() / 255)[0], atol=1e-6)

def test_defaults_are_those_of_the_authors_dqn():
    args = soft_dqn.Args()
    assert (args.learning_rate, args.max_grad_norm, args.batch_size, args.gamma) == (
        1e-4, 10, 32, 0.99)
    assert (args.train_frequency, args.target_network_frequency, args.learning_starts,
            args.buffer_size, args.total_timesteps) == (4, 40_000, 50_000, 10**6, 10**7)
    assert (args.backup, args.tau, args.n_step, args.loss, args.exploration, args.eval_epsilon) == (
        "soft-entropy", 0.1, 1, "huber", "epsilon-greedy", 0.01)
    optimizer = AdamTF([torch.nn.Parameter(torch.zeros(1))], 1e-4)
    assert optimizer.eps == 1e-4 and optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for step, epsilon in ((0, 1), (500_000, 0.55), (10**6, 0.1), (5_500_000, 0.055), (10**7, 0.01),
                          (2 * 10**7, 0.01)):
        assert soft_dqn.epsilon_at(step, args) == pytest.approx(epsilon)

# --- the replay memory ---
class Naive:
    """All steps of each environment in lists, observations whole, as the environment gave them."""
    def __init__(self, N):
        self.steps = [[] for _ in range(N)]

    def begin(self, obs):
        """A game that is cut: the step that was about to be made is none that can be drawn."""
        for steps in self.steps:
            steps.append(dict(cut=True))
        self.obs = obs

    def add(self, a, r, terminated, truncated, obs):
        for i, steps in enumerate(self.steps):
            steps.append(dict(obs=self.obs[i], a=a[i], r=r[i], done=terminated[i],
                              cut=bool(truncated[i]), next_obs=obs[i]))
        self.obs = obs

    def windows(self, C, n):
        """Those that can be drawn from the C newest slots, one of them open, by (t, env)."""
        for i, steps in enumerate(self.steps):
            first = len(steps) - C + 4 if len(steps) >= C else 0  # the stack needs three before it
            for t in range(first, len(steps) - n + 1):
                if not any(step["cut"] for step in steps[t:t + n]):
                    yield (t, i), steps[t:t + n]

def check_against_naive(memory, naive, n):
    """All that can be drawn is drawn, equally often, and is right; nothing else is drawn."""
    windows = dict(naive.windows(memory.C, n))
    draws = memory.draw(60 * len(windows), n)
    found, counts = draws.unique(dim=1, return_counts=True)
    assert [*map(tuple, found.T.tolist())] == sorted(windows)
    k = len(windows)
    chi_square = (counts - 60).square().sum() / 60
    assert abs(chi_square - (k - 1)) < 5 * math.sqrt(2 * k)
    batch = memory.sample(found, n)
    for b, key in enumerate(sorted(windows)):
        window = windows[key]
        assert torch.equal(batch.obs[b], window[0]["obs"]) and batch.a[b] == window[0]["a"]
        for d, step in enumerate(window):
            assert batch.r[d, b] == step["r"] and batch.done[d, b] == step["done"]
            assert torch.equal(batch.next_obs[d, b], step["next_obs"])

@pytest.mark.parametrize("frames, steps, C", [(260, 330, 150), (108_000, 330, 1000), (40, 60, 23)])
def test_every_window_that_is_drawn_is_that_of_a_naive_memory(frames, steps, C):
    """Real episodes: lives lost, games over, time limits, a restart of all games, a ring's wrap."""
    N, rng = 2, np.random.default_rng(0)
    envs = Atari(tiny(soft_dqn, "", max_episode_frames=frames), N)
    memory, naive = Replay(N, C, "cpu"), Naive(N)
    lost = over = cut = 0
    torch.manual_seed(0)
    for t in range(steps):
        if t in (0, steps * 2 // 3):
            s = memory.begin(envs.reset(np.array([t + 1, t + 2])))
            naive.begin(s)
        a = torch.from_numpy(rng.choice([0, 1, 1, 2, 3], N))
        envs.send(a)
        obs, r, terminated, truncated, _ = envs.recv()
        started = [game[0] for game in envs.ended]
        memory.add(a, r.sign(), terminated, truncated, obs, started)
        naive.add(a, r.sign(), terminated, truncated, obs)
        lost, cut = lost + terminated.sum(), cut + truncated.sum()
        over, envs.ended = over + len(started), []
        if t in (6, steps // 4, steps * 2 // 3 + 3, steps - 1):
            for n in (1, 3):
                check_against_naive(memory, naive, n)
    assert memory.t == steps + 2 and (memory.t > C) == (C < 1000)
    assert lost > over - cut if frames > 40 else cut
    assert over > cut == 0 if frames > 10_000 else cut

def test_a_life_lost_before_a_cut_is_not_drawn_either():
    """Else deaths would be drawn more often than they happen; n = 3, the cut behind step 9."""
    memory, obs, zero = Replay(1, 50, "cpu"), torch.zeros(1, 4, 84, 84, dtype=torch.uint8), 0
    memory.begin(obs)  # slot 0
    for t in range(1, 20):
        memory.add(zero, zero, int(t == 8), t == 9, obs, [0] if t == 9 else [])
    starts = memory.draw(2000, 3)[0].unique().tolist()
    assert starts == [t for t in range(1, 18) if t not in (7, 8, 9)]
    assert memory.draw(2000, 1)[0].unique().tolist() == [t for t in range(1, 20) if t != 9]

def test_a_memory_of_nothing_but_cuts_says_so():
    memory, obs = Replay(1, 50, "cpu"), torch.zeros(1, 4, 84, 84, dtype=torch.uint8)
    for _ in range(30):
        memory.begin(obs)
        memory.add(0, 0, 0, False, obs, [])
    assert memory.draw(4, 1).shape == (2, 4)
    with pytest.raises(ValueError, match="^--n-step 2: .*cuts"):
        memory.draw(4, 2)

def test_an_update_never_looks_at_the_values_of_the_device():
    """On the meta device there are none: so a GPU is not waited for, and all is on it."""
    memory, device = Replay(2, 20, "meta"), torch.device("meta")
    obs = torch.zeros(2, 4, 84, 84, dtype=torch.uint8, device=device)
    memory.begin(obs)
    for _ in range(12):
        a = torch.zeros(2, dtype=torch.int64, device=device)
        memory.add(a, a.float(), a.bool(), torch.zeros(2, dtype=torch.bool), obs, [1])
    with device:
        net, target = soft_dqn.QNetwork(4), soft_dqn.QNetwork(4)
    optimizer = AdamTF(net.parameters(), 1e-4, fused=False)
    for n, tau, log_pi_bar in ((1, 0.0, 0.0), (3, 0.1, -math.log(4))):
        batch = memory.sample(memory.draw(5, n), n)
        y = targets(batch.r, batch.done, target(batch.next_obs), log_pi_bar, tau, GAMMA)
        L = soft_dqn.loss(net(batch.obs), batch.a, y, "huber")
        L.backward()
        norm = clip_each_(net.parameters(), 10.0)
        optimizer.step()
        shapes = [(5, 4, 84, 84), (5,), (n, 5), (n, 5), (n, 5, 4, 84, 84), (5,), (), ()]
        assert [tuple(x.shape) for x in (*batch, y, L, norm)] == shapes
        grads = [p.grad for p in net.parameters()]
        assert {x.device for x in (*batch, y, L, norm, *grads)} == {device}

# --- runs ---
SIX = (dict(backup="hard"), dict(backup="hard", n_step=5), dict(tau=0.1), dict(tau=0.01),
       dict(backup="soft-kl", tau=0.1), dict(backup="soft-kl", tau=0.01))  # the arms of Figure 2
MORE = (dict(backup="hard", tau=0.0), dict(backup="soft-kl", n_step=5),
        dict(n_step=3, exploration="boltzmann", loss="square"))

@pytest.mark.parametrize("arm", SIX + MORE, ids=str)
def test_every_arm_trains(arm, tmp_path):
    run = trained(soft_dqn, tmp_path, total_timesteps=120, **arm)
    first, last = rows(run)
    assert list(last)[2:] == [*soft_dqn.TERMS, "epsilon", "updates", "replay_fill"]
    assert last["step"] == "120" and last["updates"] == str(120 // 4 - 40 // 4)
    assert all(math.isfinite(float(last[name])) for name in soft_dqn.TERMS)
    assert (last["max_Q"] == last["V_Q"]) == (arm.get("backup") == "hard")
    assert 0 <= float(last["entropy"]) <= math.log(4) + 1e-6
    assert arm.items() <= checkpoint(soft_dqn, run)["args"].items()

@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_updates_per_step_do_not_depend_on_environments_nor_see_the_step_in_flight(
        num_envs, tmp_path, monkeypatch):
    log = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(self, *args):
            log.append((name, getattr(self, "t", None)))
            return original(self, *args)
        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((Atari, "send"), (Replay, "sample"), (AdamTF, "step"), (Atari, "recv")):
        watch(owner, name)
    run = trained(soft_dqn, tmp_path, num_envs=num_envs, total_timesteps=240, learning_starts=60,
                  log_every=1)
    names = [name for name, _ in log]
    assert names.count("sample") == names.count("step") == 240 // 4 - 60 // 4
    sent = 0
    for name, t in log:
        sent += name == "send"
        assert name != "sample" or t == sent, "slot 0 and the steps before the last one sent"
    assert [name for name in names if name not in ("sample", "step")] == ["send", "recv"] * sent
    assert all(names[i + 1] in ("sample", "recv") for i, x in enumerate(names) if x == "send")
    for row in rows(run):
        assert int(row["updates"]) == max(0, int(row["step"]) // 4 - 15)
        assert (row["loss"] == "nan") == (int(row["step"]) < 64) or num_envs < 4

def test_the_target_network_is_copied_on_schedule(tmp_path, monkeypatch):
    equal_at, log = [], soft_dqn.Run.log

    def watched(self, *terms, **columns):
        if equal(*(self.parts[name].state_dict() for name in ("net", "target"))):
            equal_at.append(self.step)
        log(self, *terms, **columns)

    monkeypatch.setattr(soft_dqn.Run, "log", watched)
    trained(soft_dqn, tmp_path, learning_starts=20, train_frequency=2)
    assert equal_at[-4:] == [100, 200, 300, 400] and set(equal_at[:-4]) == set(range(2, 22, 2))

def test_a_run_that_saves_its_memory_resumes_bit_equal(tmp_path):
    """Also with a memory that is full; the rows, networks, optimizer and memory are one run's."""
    flags = dict(save_every=80, save_replay=True, n_step=3, buffer_size=100, total_timesteps=240)
    whole = trained(soft_dqn, tmp_path / "whole", **flags)
    run = killed(soft_dqn, tmp_path / "broken", 200, **flags)
    assert checkpoint(soft_dqn, run)["counts"]["step"] == 160
    soft_dqn.train(resumed(soft_dqn, run))
    assert rows(run) == rows(whole)
    states = [checkpoint(soft_dqn, folder) for folder in (whole, run)]
    for name in ("net", "target", "optimizer", "memory"):
        assert equal(states[0][name], states[1][name]), name
    assert states[0]["memory"]["t"] == 120 + 3 > states[0]["memory"]["C"] == 50

def test_without_it_a_resumed_run_plays_first_what_learning_needs(tmp_path, monkeypatch, capsys):
    """learning_starts steps with the saved policy and epsilon, counted nowhere; then new games."""
    run = killed(soft_dqn, tmp_path, 310, save_every=200, log_every=10)
    assert checkpoint(soft_dqn, run)["counts"]["step"] == 200
    calls, sampled, noise = [], [], []
    epsilon_at, reset, sample = soft_dqn.epsilon_at, Atari.reset, Replay.sample
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda x: (noise.append(int(x)), manual_seed(x))[1])
    monkeypatch.setattr(soft_dqn, "epsilon_at", lambda step, args: (
        calls.append(step), epsilon_at(step, args))[1])
    monkeypatch.setattr(Atari, "reset", lambda self, seeds: (
        calls.append(seeds.tolist()), reset(self, seeds))[1])
    monkeypatch.setattr(Replay, "sample", lambda self, *rest: (
        sampled.append((self.t, self.cut.any(1).nonzero().flatten().tolist())),
        sample(self, *rest))[1])
    capsys.readouterr()
    soft_dqn.train(resumed(soft_dqn, run, total_timesteps=410))
    assert "replay memory 0.0 GB, refilled with 40 steps, which do not count" in (
        capsys.readouterr().out)
    seeds = [np.random.SeedSequence([1, 200, *purpose]).generate_state(2) >> 1
             for purpose in (b"refill", b"games")]
    assert calls[0] == seeds[0].tolist() and calls[21] == seeds[1].tolist()
    assert calls[1:21] == [200] * 20, "40 steps of two environments"
    assert len(noise) == len({*noise}) > 20, "the same noise in no two steps"
    assert sampled[0] == (1 + 20 + 1 + 1, [0, 21]), "a step of training, two starts of games"
    after = [row for row in rows(run) if int(row["step"]) > 200]
    assert [row["step"] for row in after] == [str(step) for step in range(210, 411, 10)]
    assert after[0]["updates"] == str(210 // 4 - 40 // 4) and after[0]["score"] != "nan"

def test_a_signal_while_the_memory_is_refilled_ends_the_run(tmp_path, monkeypatch):
    run = trained(soft_dqn, tmp_path, total_timesteps=200)
    before, recv, steps = checkpoint(soft_dqn, run), Atari.recv, []

    def signaled(self):
        steps.append(1)
        soft_dqn.STOP.extend([15] * (len(steps) == 3))
        return recv(self)

    monkeypatch.setattr(Atari, "recv", signaled)
    try:
        soft_dqn.train(resumed(soft_dqn, run, total_timesteps=300))
    finally:
        soft_dqn.STOP.clear()
    assert len(steps) == 3 and equal(checkpoint(soft_dqn, run), before)

def test_evaluation_needs_no_memory(tmp_path, monkeypatch, capsys):
    run = trained(soft_dqn, tmp_path, total_timesteps=60, save_replay=True)
    monkeypatch.setattr(soft_dqn, "Replay", None)
    args = checkpoint(soft_dqn, run)["args"] | dict(evaluate=str(run), eval_games=2)
    soft_dqn.train(soft_dqn.Args(**args))
    assert "step 60: score" in capsys.readouterr().out

@pytest.mark.parametrize("flags, message", [
    (dict(tau=0.0), "--tau 0: "),
    (dict(tau=1e-7, backup="hard", exploration="boltzmann"), "--tau 1e-07: "),
    (dict(buffer_size=27, n_step=5, learning_starts=40), "--buffer-size 27, .* 28 "),
    (dict(learning_starts=11), "--learning-starts 11: .* 12 "),
    (dict(eval_epsilon=1.1), "--eval-epsilon 1.1: "),
    (dict(n_step=0), "--n-step 0: "),
    (dict(train_frequency=0), "--train-frequency 0: ")])
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        soft_dqn.train(tiny(soft_dqn, tmp_path, **flags))
    assert str(e.value).startswith("--") and not list(tmp_path.iterdir())

def test_a_run_says_what_it_takes(tmp_path, capsys):
    """Before it takes it: no page of the memory is touched until a frame is written."""
    trained(soft_dqn, tmp_path / "1", total_timesteps=40)
    assert "warning: nothing is learned in 40 steps" in capsys.readouterr().out
    flags = dict(num_envs=8, buffer_size=10**6, learning_starts=50_000, total_timesteps=60_000)
    killed(soft_dqn, tmp_path / "2", 8, **flags)
    out = capsys.readouterr().out
    assert "learning starts at 50,000; replay memory 7.1 GB\n" in out and "nothing" not in out
