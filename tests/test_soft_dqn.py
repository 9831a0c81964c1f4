"""The paper's sections 3.5 and 6.2, numerically; the replay memory against a naive one; resume."""
import dataclasses
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import soft_dqn
from exact import MDP
from test_run import checkpoint, equal, resumed, rows, small, tiny, train_until

TAU, GAMMA = 0.3, 0.9


# --- the paper, float64 ---
def value(Q, log_pi_bar, tau=TAU):
    """V_Q by its other form, Eq. 31: E_pi[Q] - tau KL[pi || pi_bar], pi by Eq. 28."""
    weights = log_pi_bar.exp() * (Q / tau).exp()
    pi = weights / weights.sum(-1, keepdim=True)
    return (pi * Q).sum(-1) - tau * (pi * (pi.log() - log_pi_bar)).sum(-1)


def policy(Q, log_pi_bar, tau=TAU):
    weights = log_pi_bar.exp() * (Q / tau).exp()
    return weights / weights.sum(-1, keepdim=True)


def problem(seed):
    mdp = MDP(seed)
    return mdp, torch.randn(mdp.S, mdp.A, generator=torch.Generator().manual_seed(seed + 50))


def expected_target(mdp, Q, n, behaviour, tau=TAU, target=soft_dqn.targets):
    """E[y_t | s, a] over all paths of n steps that follow, (S, A), through targets()."""
    total = torch.zeros(mdp.S, mdp.A)
    weight = torch.zeros(mdp.S, mdp.A)
    for probability, s, a in mdp.trajectories(n, behaviour):
        here, after = s[:-1], s[1:]
        y = target(mdp.r[here, a][:, None], mdp.ends[here, a][:, None], torch.zeros(n, 1),
                   Q[after][:, None], mdp.log_pi_bar[after][:, None], tau, GAMMA)
        total[s[0], a[0]] += probability * y[0]
        weight[s[0], a[0]] += probability
    return total / weight


def operator(mdp, Q, n, first_term=True):
    """T^n Q of Eq. 33, 40 and 41 with the policy pi_Q throughout, by dynamic programming."""
    pi, result = policy(Q, mdp.log_pi_bar), Q
    kl = (pi * (pi.log() - mdp.log_pi_bar)).sum(-1)
    for _ in range(n):
        V = (pi * result).sum(-1) - TAU * kl
        result = mdp.r + GAMMA * (1 - mdp.ends) * (mdp.p @ V)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_soft_value_and_policy_are_equations_29_to_31(double, seed):
    mdp, Q = problem(seed)
    V = soft_dqn.soft_value(Q, mdp.log_pi_bar, TAU)
    assert (V - value(Q, mdp.log_pi_bar)).abs().max() < 1e-12
    log_pi = soft_dqn.boltzmann(Q, mdp.log_pi_bar, TAU)
    assert (log_pi.exp() - policy(Q, mdp.log_pi_bar)).abs().max() < 1e-12
    assert (log_pi - mdp.log_pi_bar - (Q - V[:, None]) / TAU).abs().max() < 1e-12  # Eq. 30
    kl = soft_dqn.kl_divergence(log_pi, mdp.log_pi_bar)
    assert ((log_pi.exp() * Q).sum(-1) - TAU * kl - V).abs().max() < 1e-12  # Eq. 31


@pytest.mark.parametrize("seed", range(3))
def test_the_three_backups_are_equations_81_to_83_and_not_as_printed(double, seed):
    """Row by row for one transition that goes on and one that ends the game."""
    g = torch.Generator().manual_seed(seed)
    Q, r, A = torch.randn(1, 2, 4, generator=g), torch.randn(1, 2, generator=g), 4
    ends, alive = torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, 0.0])
    uniform, none, lse = torch.tensor(-math.log(A)), torch.tensor(0.0), (Q[0] / TAU).exp().sum(-1)

    def y(log_pi_bar, tau):
        return soft_dqn.targets(r, ends, torch.zeros(1, 2), Q, log_pi_bar, tau, GAMMA)

    hard = r[0] + GAMMA * alive * Q[0].max(-1).values
    entropy = r[0] + GAMMA * alive * TAU * lse.log()
    kl = r[0] + GAMMA * alive * TAU * (lse.log() - math.log(A))
    for got, expected in ((y(none, 0.0), hard), (y(none, TAU), entropy), (y(uniform, TAU), kl)):
        assert (got - expected).abs().max() < 1e-12
    printed_83 = r[0] + GAMMA * alive * lse.log()
    printed_82 = r[0] + GAMMA * alive * lse.log() - math.log(A)
    assert (y(none, TAU) - printed_83).abs().max() > 1e-2
    assert (y(uniform, TAU) - printed_82).abs().max() > 1e-2
    only_tau = r[0] + GAMMA * alive * TAU * lse.log() - math.log(A)
    unmasked = r[0] + GAMMA * alive * TAU * lse.log() - GAMMA * TAU * math.log(A)
    for wrong in (only_tau, unmasked):
        assert (y(uniform, TAU) - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_one_step_is_equations_39_and_45_under_any_behaviour(double, seed):
    mdp, Q = problem(seed)
    expected = mdp.r + GAMMA * (1 - mdp.ends) * (mdp.p @ value(Q, mdp.log_pi_bar))
    assert (expected - operator(mdp, Q, 1)).abs().max() < 1e-12
    for behaviour in (policy(Q, mdp.log_pi_bar), torch.tensor([[0.9, 0.1]]).repeat(mdp.S, 1)):
        assert (expected_target(mdp, Q, 1, behaviour) - expected).abs().max() < 1e-10
    here = (mdp.r + GAMMA * (policy(Q, mdp.log_pi_bar) * Q).sum(-1)[:, None])  # Eq. 38 as printed
    assert (here - expected).abs().max() > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_n_steps_are_equation_46_with_games_that_end_inside_the_window(double, seed, n):
    """On the target's own policy exactly the operator of Eq. 40 and 41, on another one biased."""
    mdp, Q = problem(seed)
    assert 0 < mdp.ends.sum() < mdp.ends.numel()
    own, exact = policy(Q, mdp.log_pi_bar), operator(mdp, Q, n)
    assert (expected_target(mdp, Q, n, own) - exact).abs().max() < 1e-10
    other = 0.1 * own + 0.9 / mdp.A
    gap = (expected_target(mdp, Q, n, other) - exact).abs().max()
    assert gap < 1e-10 if n == 1 else gap > 1e-3, "the bias that the docstring speaks of"

    def printed(r, ends, cut, Q, log_pi_bar, tau, gamma):  # gamma^{t+n} at t = 5
        y = soft_dqn.targets(r, ends, cut, Q, log_pi_bar, tau, gamma)
        alive = (1 - ends).prod(0)
        V = value(Q[-1], log_pi_bar[-1], tau)
        return y + alive * (gamma ** (5 + len(r)) - gamma ** len(r)) * V

    def first_kl(r, ends, cut, Q, log_pi_bar, tau, gamma):  # KL_t at d = 0 as well
        kl = tau * (own * (own.log() - mdp.log_pi_bar)).sum(-1)[0]
        return soft_dqn.targets(r, ends, cut, Q, log_pi_bar, tau, gamma) - kl

    for wrong in (printed, first_kl):
        assert (expected_target(mdp, Q, n, own, target=wrong) - exact).abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.0, TAU])
@pytest.mark.parametrize("seed", range(3))
def test_targets_are_the_forward_sum_with_every_kind_of_ending(double, seed, tau):
    g = torch.Generator().manual_seed(seed)
    n, B, A = 4, 60, 3
    Q, r = torch.randn(n, B, A, generator=g), torch.randn(n, B, generator=g)
    terminated, truncated = (torch.rand(2, n, B, generator=g) < 0.25).double()
    log_pi_bar = torch.randn(A, generator=g).log_softmax(-1)
    y = soft_dqn.targets(r, terminated, truncated, Q, log_pi_bar, tau, GAMMA)
    V = value(Q, log_pi_bar) if tau else Q.max(-1).values
    pi = policy(Q, log_pi_bar)
    kl = (pi * (pi.log() - log_pi_bar)).sum(-1)
    for b in range(B):
        total = 0.0
        for d in range(n):
            total += GAMMA**d * (r[d, b] - (tau * kl[d - 1, b] if d else 0.0))
            if terminated[d, b]:
                break
            if truncated[d, b] or d == n - 1:
                total += GAMMA ** (d + 1) * V[d, b]
                break
        assert abs(y[b] - total) < 1e-10


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_maximum_needs_only_the_state_where_the_sum_ends(double, n):
    """Eq. 81 with n steps: one network pass in place of n, the same targets."""
    g = torch.Generator().manual_seed(n)
    B, A = 80, 3
    next_obs, r = torch.randn(n, B, A, generator=g), torch.randn(n, B, generator=g)
    terminated, truncated = (torch.rand(2, n, B, generator=g) < 0.25).double()
    batch = soft_dqn.Batch(None, None, r, terminated, truncated, next_obs, None)
    last = soft_dqn.last_obs(batch)
    assert last.shape == (1, B, A)

    def y(Q):
        return soft_dqn.targets(r, terminated, truncated, Q, torch.tensor(0.0), 0.0, GAMMA)

    assert torch.equal(y(next_obs.sin()), y(last.sin()))
    assert n == 1 or (y(next_obs[-1:].sin()) - y(last.sin())).abs().max() > 0.1


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


def test_tau_to_zero_is_the_hard_maximum(double):
    mdp, Q = problem(0)
    A = mdp.A
    for log_pi_bar in (torch.zeros(A), torch.full((A,), -math.log(A))):
        hard = soft_dqn.soft_value(Q, log_pi_bar, 0.0)
        assert torch.equal(hard, Q.max(-1).values)
        gaps = [(soft_dqn.soft_value(Q, log_pi_bar, tau) - hard).abs().max()
                for tau in (1e-1, 1e-2, 1e-3, 1e-6)]
        assert all(gap <= tau * math.log(A) + 1e-12
                   for gap, tau in zip(gaps, (1e-1, 1e-2, 1e-3, 1e-6)))


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
    y = soft_dqn.targets(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2),
                         Q.expand(2, 2, 3), zero, tau, 0.99)
    (V.sum() + kl.sum() + y.sum()).backward()
    assert all(x.isfinite().all() for x in (V, log_pi, kl, y, Q.grad))


@pytest.mark.parametrize("kind", ["square", "huber"])
@pytest.mark.parametrize("backup", ["hard", "entropy", "kl"])
def test_gradient_descent_on_the_loss_finds_the_optimal_q_of_value_iteration(double, backup, kind):
    """Over all transitions of a random MDP, weighted by their probability."""
    mdp, gamma = MDP(3), 0.8
    tau = 0.0 if backup == "hard" else TAU
    log_pi_bar = torch.tensor(-math.log(mdp.A) if backup == "kl" else 0.0)
    best = torch.zeros(mdp.S, mdp.A)
    for _ in range(500):
        lse = (best / TAU).exp().sum(-1).log() + log_pi_bar
        V = best.max(-1).values if backup == "hard" else TAU * lse
        best = mdp.r + gamma * (1 - mdp.ends) * (mdp.p @ V)
    s, a, s_next = (x.flatten() for x in torch.meshgrid(
        *(torch.arange(k) for k in mdp.p.shape), indexing="ij"))
    Q = torch.zeros(mdp.S, mdp.A, requires_grad=True)
    for _ in range(2000):
        y = soft_dqn.targets(mdp.r[s, a][None], mdp.ends[s, a][None], torch.zeros(1, len(s)),
                             Q.detach()[s_next][None], log_pi_bar, tau, gamma)
        L = soft_dqn.loss(Q[s], a, y, mdp.p[s, a, s_next], kind)
        Q.data -= 3.0 * torch.autograd.grad(L, Q)[0]
    assert L.item() > 0, "the minimum is the mean of different targets"
    assert (Q - best).abs().max() < (1e-3 if kind == "square" else 0.2)


def test_loss_is_half_the_square_or_hubers_mean_over_what_has_weight(double):
    g = torch.Generator().manual_seed(0)
    Q, y = 3 * torch.randn(50, 4, generator=g), torch.randn(50, generator=g)
    a = torch.randint(4, (50,), generator=g)
    weight = (torch.rand(50, generator=g) < 0.7).double()
    error = [(Q[i, a[i]] - y[i]).abs() for i in range(50) if weight[i]]
    square = sum(0.5 * e**2 for e in error) / len(error)
    huber = sum(0.5 * e**2 if e < 1 else e - 0.5 for e in error) / len(error)
    assert abs(soft_dqn.loss(Q, a, y, weight, "square") - square) < 1e-12
    assert abs(soft_dqn.loss(Q, a, y, weight, "huber") - huber) < 1e-12
    assert max(error) > 2 and soft_dqn.loss(Q, a, y, 0 * weight, "huber") == 0


# --- the DQN underneath ---
def test_adam_is_tensorflows(double):
    """Against the formula, with the epsilon that is not corrected; torch.optim.Adam differs."""
    p, q = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    lr, m, v, x = 1e-4, 0.0, 0.0, np.zeros(3)
    optimizer, other = soft_dqn.AdamTF([p], lr), torch.optim.Adam([q], lr, eps=1e-4)
    rng = np.random.default_rng(0)
    for t in range(1, 200):
        g = rng.normal(size=3) * 1e-3
        p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        optimizer.step(torch.tensor(True))
        other.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-4)
        assert np.abs(p.detach().numpy() - x).max() < 1e-14
    assert (p - q).abs().max() > 1e-4


def test_adam_leaves_everything_alone_when_the_update_is_not_finite():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = soft_dqn.AdamTF([p], 0.1)
    for when in (False, True, False):  # also as the very first update
        p.grad = torch.ones(3) if when else torch.tensor([math.nan, math.inf, 1.0])
        before, state = p.detach().clone(), repr((optimizer.state, optimizer.param_groups[0]["t"]))
        optimizer.step(torch.tensor(when))
        after = repr((optimizer.state, optimizer.param_groups[0]["t"]))
        assert torch.equal(p, before) != when and (after == state) != when


def test_each_tensor_is_clipped_by_its_own_norm():
    params = [torch.nn.Parameter(torch.zeros(k)) for k in (4, 9, 1, 2)]
    for p, scale in zip(params, (1.0, 20.0, 0.0, 10.0)):
        p.grad = torch.full_like(p, scale)
    norm = soft_dqn.clip_each_(params, 10.0)
    assert norm.item() == pytest.approx(math.sqrt(4 + 9 * 400 + 2 * 100))
    assert [p.grad.norm().item() for p in params] == pytest.approx([2, 10, 0, 10])


def test_the_actions_are_on_the_last_axis_whatever_stands_before_it():
    g = torch.Generator().manual_seed(5)
    Q, y, weight = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3), torch.ones(2, 3)
    a = torch.randint(4, (2, 3), generator=g)
    for kind in ("huber", "square"):
        parts = [soft_dqn.loss(*x, kind) for x in zip(Q, a, y, weight)]
        assert abs(soft_dqn.loss(Q, a, y, weight, kind) - sum(parts) / 2) < 1e-6
    assert torch.equal(soft_dqn.epsilon_greedy(Q, 0.0, g), Q.argmax(-1))
    random = torch.stack([soft_dqn.epsilon_greedy(Q, 1.0, g) for _ in range(200)])
    assert random.shape == (200, 2, 3) and sorted(random.unique().tolist()) == [0, 1, 2, 3]
    half = torch.stack([soft_dqn.epsilon_greedy(Q, 0.5, g) for _ in range(200)])
    best = (half == Q.argmax(-1)).float().mean(0)
    assert ((best > 0.5) & (best < 0.75)).all() and len(best.unique()) > 1, "each on its own"
    assert torch.equal(soft_dqn.boltzmann_sample(Q, 1e-4, g), Q.argmax(-1))


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
    group = soft_dqn.AdamTF([torch.nn.Parameter(torch.zeros(1))], 1e-4).param_groups[0]
    assert group["eps"] == 1e-4 and group["betas"] == (0.9, 0.999)
    horizon = dataclasses.replace(args, schedule_timesteps=args.total_timesteps)
    for step, epsilon in ((0, 1), (500_000, 0.55), (10**6, 0.1), (5_500_000, 0.055), (10**7, 0.01),
                          (2 * 10**7, 0.01)):
        assert soft_dqn.epsilon_at(step, horizon) == pytest.approx(epsilon)


def test_exploration_follows_its_policy():
    g, N = torch.Generator().manual_seed(0), 100_000
    Q = torch.tensor([0.1, 0.3, 0.0, -0.2]).repeat(N, 1)
    for sampled, expected in (
            (soft_dqn.epsilon_greedy(Q, 0.2, g), torch.tensor([0.05, 0.85, 0.05, 0.05])),
            (soft_dqn.boltzmann_sample(Q, 0.1, g), (Q[0] / 0.1).softmax(-1))):
        frequency = sampled.bincount(minlength=4) / N
        assert (frequency - expected).abs().max() < 4 * math.sqrt(0.25 / N)
    assert (soft_dqn.epsilon_greedy(Q, 0.0, g) == 1).all()


# --- the replay memory ---
class Naive:
    """A list of entries for each environment, as plain as can be; an entry is a dict or None.

    None stands where the memory spends a slot on the last frame of a cut game, and for the slot
    that is open. Observations are kept whole, as the environment gave them.
    """

    def __init__(self, obs):
        self.obs, self.age = obs, [0] * len(obs)
        self.entries = [[] for _ in obs]

    def add(self, a, s, reward, terminated, truncated, final_s, ended):
        new = {i for i, *_ in ended}
        for i, entries in enumerate(self.entries):
            entries.append(dict(obs=self.obs[i], a=int(a[i]), r=float(np.sign(reward[i])),
                                terminated=bool(terminated[i]), truncated=bool(truncated[i]),
                                next_obs=final_s[i] if truncated[i] else s[i], age=self.age[i]))
            self.age[i] = 0 if i in new else self.age[i] + 1
            if truncated[i]:
                entries.append(None)
        self.obs = s

    def restart(self, obs):
        for entries in self.entries:
            if entries[-1]:  # else the step before it cut the game
                entries[-1]["truncated"] = True
            entries.append(None)
        self.obs, self.age = obs, [0] * len(obs)

    def transitions(self, C, n):
        """What can be drawn, oldest first, from the C newest entries of each environment."""
        for entries in self.entries:
            entries = [*entries, None]  # the open slot
            low = max(0, len(entries) - C)
            for k in range(low, len(entries) - n):
                if entries[k] and k - min(3, entries[k]["age"]) >= low:
                    yield self.window(entries[k:k + n])

    @staticmethod
    def window(entries):
        used = []
        for entry in entries:
            used.append(entry)
            if entry["terminated"] or entry["truncated"]:
                break
        return used


def check_against_naive(memory, naive, n):
    """Every transition of the memory and, beyond the order, none but those of the naive one."""
    starts = (memory.head.clamp(max=memory.C) - n).clamp(min=0).sum().item()
    batch = memory.sample((torch.arange(starts, dtype=torch.float64) + 0.5) / starts, n)
    kept = batch.weight.nonzero().flatten().tolist()
    expected = list(naive.transitions(memory.C, n))
    assert len(kept) == len(expected) > 0
    for b, window in zip(kept, expected):
        assert np.array_equal(batch.obs[b], window[0]["obs"]) and batch.a[b] == window[0]["a"]
        for d, entry in enumerate(window):
            assert batch.r[d, b] == entry["r"]
            assert bool(batch.terminated[d, b]) == entry["terminated"]
            if not entry["terminated"]:
                assert bool(batch.truncated[d, b]) == entry["truncated"]
                assert np.array_equal(batch.next_obs[d, b], entry["next_obs"])
    return len(expected)


@pytest.mark.parametrize("game, frames, steps, C", [
    ("ALE/Breakout-v5", 260, 330, 150), ("ALE/Breakout-v5", 108_000, 330, 1000),
    ("ALE/Breakout-v5", 40, 60, 23)])
def test_every_sampled_transition_is_that_of_a_naive_memory(game, frames, steps, C):
    """Real episodes: lives lost, games over, time limits, a restart of all games, a ring's wrap."""
    N = 2
    args = soft_dqn.Args(env_id=game, max_episode_frames=frames)
    envs, rng = soft_dqn.Atari(args, N), np.random.default_rng(0)
    memory, cpu = soft_dqn.Replay(N, C, torch.device("cpu")), []
    s = envs.reset(np.array([1, 2]))
    assert torch.equal(memory.begin(s), torch.from_numpy(s))
    naive, lost, over, cut = Naive(s), 0, 0, 0
    for t in range(steps):
        a = rng.choice([0, 1, 1, 2, 3], N)
        received = envs.step(a)
        obs = memory.add(torch.from_numpy(a), *received, envs.ended)
        naive.add(a, *received, envs.ended)
        assert np.array_equal(obs, received[0])
        lost += received[2].sum()
        over += sum(not game[3] for game in envs.ended)
        cut += received[3].sum()
        if t == steps * 2 // 3:
            s = envs.reset(np.array([3, 4]))
            memory.begin(s)
            naive.restart(s)
        if t in (6, steps // 4, steps * 2 // 3, steps * 2 // 3 + 2, steps - 1):
            cpu.append([check_against_naive(memory, naive, n) for n in (1, 3)])
    assert lost > over or frames == 40
    assert over if frames > 10_000 else cut
    assert (memory.head > C).any() == (C < 1000) and len(set(memory.head.tolist())) <= N


def random_step(rng, N):
    """What Atari.recv and .ended would say, in pictures of noise."""
    terminated, truncated, over = rng.random((3, N)) < 0.1
    ended = [(i, 0.0, 1, truncated[i]) for i in np.flatnonzero(truncated | terminated & over)]
    return (torch.from_numpy(rng.integers(0, 4, N)),
            *rng.integers(0, 256, (1, N, 4, 84, 84), np.uint8), rng.integers(-3, 3, N), terminated,
            truncated, rng.integers(0, 256, (N, 4, 84, 84), np.uint8), ended)


def filled(N, C, steps, seed=0, folder=None):
    rng, memory = np.random.default_rng(seed), soft_dqn.Replay(N, C, torch.device("cpu"), folder)
    memory.begin(rng.integers(0, 256, (N, 4, 84, 84), np.uint8))
    for _ in range(steps):
        memory.add(*random_step(rng, N))
    return memory, rng


def test_every_transition_is_equally_likely():
    """Also where environments have written different numbers of slots."""
    memory, _ = filled(3, 40, 30)
    assert len(set(memory.head.tolist())) > 1
    starts = memory.head.clamp(max=40) - 1
    u = torch.rand(60_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = [memory.sample(part, 1) for part in u.split(1000)]
    keys, weight = (torch.cat(x) for x in zip(*(
        (b.obs[:, 3, 0, :8].double() @ 256.0 ** torch.arange(6, -2, -1).double(), b.weight)
        for b in batch)))
    counts = keys[weight > 0].unique(return_counts=True)[1].double()
    usable = int(starts.sum() - memory.last.sum())
    assert len(counts) == usable
    expected = len(u) / starts.sum()
    assert (counts - expected).abs().max() < 5 * expected.sqrt()


def test_a_memory_that_does_not_fit_is_refused_with_both_numbers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(soft_dqn, "free_bytes", lambda cuda: 2**30)
    with pytest.raises(soft_dqn.Refused, match=r"--buffer-size 1000000: the replay memory needs "
                       r"6\.58 GiB of memory, 1\.00 GiB are free"):
        soft_dqn.train(soft_dqn.Args(device="cpu"))
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert 2**20 < soft_dqn.free_bytes(False) < 2**50


# --- runs ---
SIX = ("--backup hard", "--backup hard --n-step 5", "--backup soft-entropy --tau 0.1",
       "--backup soft-entropy --tau 0.01", "--backup soft-kl --tau 0.1",
       "--backup soft-kl --tau 0.01")  # the arms of Figure 2
MORE = ("--backup hard --tau 0", "--backup soft-kl --n-step 5",
        "--n-step 3 --exploration boltzmann --loss square")


@pytest.mark.parametrize("arm", SIX + MORE)
def test_every_arm_trains_resumes_and_evaluates_from_the_command_line(arm, tmp_path, monkeypatch,
                                                                      capsys):
    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["soft_dqn.py", *flags])
        soft_dqn.main(soft_dqn.Args, soft_dqn.train, soft_dqn.__doc__)

    command(*small(soft_dqn), "--total-timesteps", "200", "--runs-dir", str(tmp_path), *arm.split())
    folder, = tmp_path.iterdir()
    command("--resume", str(folder), "--total-timesteps", "300")
    row = rows(folder)[-1]
    assert row["step"] == "300" and row["updates"] == "65"
    assert all(math.isfinite(float(row[name])) for name in soft_dqn.TERMS)
    assert (row["max_Q"] == row["V_Q"]) == ("hard" in arm)
    saved = checkpoint(soft_dqn, folder)["args"]
    for flag, value in zip(arm.split()[::2], arm.split()[1::2]):
        assert str(saved[flag[2:].replace("-", "_")]).removesuffix(".0") == value
    command("--evaluate", str(folder), "--eval-episodes", "2")
    assert "evaluation at step 300" in capsys.readouterr().out


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_updates_per_step_do_not_depend_on_environments_nor_see_the_step_in_flight(
        num_envs, tmp_path, monkeypatch):
    log, sent = [], []

    def watch(owner, name, note):
        original = getattr(owner, name)

        def watched(self, *args):
            note(self)
            return original(self, *args)
        monkeypatch.setattr(owner, name, watched)

    def sampled(memory):
        stored = memory.head - 1 - memory.last.sum(-1)  # no game has been restarted here
        log.append((len(sent), stored.tolist()))

    watch(soft_dqn.Atari, "send", sent.append)
    watch(soft_dqn.Replay, "sample", sampled)
    steps = []
    watch(soft_dqn.AdamTF, "step", steps.append)
    args = tiny(soft_dqn, tmp_path, num_envs=num_envs, total_timesteps=240, train_frequency=4,
                learning_starts=60, log_every=1)
    folder = soft_dqn.train(args)["folder"]
    assert len(steps) == 240 // 4 - 60 // 4 == len(log)
    assert all(stored == [in_flight - 1] * num_envs for in_flight, stored in log)
    for row in rows(folder):
        assert int(row["updates"]) == max(0, int(row["step"]) // 4 - 15)
        assert (row["loss"] == "nan") == (int(row["step"]) < 64) or num_envs < 4


def test_the_target_network_is_copied_on_schedule(tmp_path, monkeypatch):
    equal_at, goes_on = [], soft_dqn.Run.goes_on

    def watched(self, *act):
        net, target = (self.parts[name].state_dict() for name in ("net", "target"))
        if equal(net, target):
            equal_at.append(self.step)
        return goes_on(self, *act)

    monkeypatch.setattr(soft_dqn.Run, "goes_on", watched)
    soft_dqn.train(tiny(soft_dqn, tmp_path, learning_starts=20, target_network_frequency=100,
                        train_frequency=2))
    assert equal_at[-4:] == [100, 200, 300, 400] and set(equal_at[:-4]) == set(range(0, 22, 2))


def test_extending_a_run_keeps_the_horizon_of_epsilon(tmp_path):
    folder = soft_dqn.train(tiny(soft_dqn, tmp_path, schedule_timesteps=1000))["folder"]
    soft_dqn.train(resumed(soft_dqn, folder, total_timesteps=600))
    assert rows(folder)[-1]["step"] == "600"
    for row in rows(folder):
        expected = np.interp(int(row["step"]), (0, 100, 1000), (1, 0.1, 0.01))
        assert float(row["epsilon"]) == pytest.approx(expected, rel=1e-5)


def test_resume_refills_the_memory_without_counting_it(tmp_path, monkeypatch):
    """learning_starts steps of the saved policy at the saved epsilon, then training's own games."""
    args = tiny(soft_dqn, tmp_path, checkpoint_every=200, log_every=10)
    folder = train_until(soft_dqn, monkeypatch, args, 310)
    assert checkpoint(soft_dqn, folder)["step"] == 200
    assert not list(Path(folder).glob("replay-*"))
    calls, fills = [], []
    epsilon_at, sample = soft_dqn.epsilon_at, soft_dqn.Replay.sample
    reset = soft_dqn.Atari.reset

    def watched_epsilon(step, args):
        calls.append(step)
        return epsilon_at(step, args)

    def watched_sample(self, *rest):
        fills.append(self.head.tolist())
        return sample(self, *rest)

    def watched_reset(self, seeds):
        calls.append(seeds.tolist())
        return reset(self, seeds)

    monkeypatch.setattr(soft_dqn, "epsilon_at", watched_epsilon)
    monkeypatch.setattr(soft_dqn.Replay, "sample", watched_sample)
    monkeypatch.setattr(soft_dqn.Atari, "reset", watched_reset)
    soft_dqn.train(resumed(soft_dqn, folder, total_timesteps=210))
    refill, training = (soft_dqn.seeds(1, 200, purpose, 3 if purpose == "refill" else 2).tolist()
                        for purpose in ("refill", "training"))
    assert calls[0] == refill[:2] and calls[21] == training
    assert calls[1:21] == [200] * 20  # learning_starts 40 over two environments
    assert fills[0] == [22 + 1, 22 + 1]  # 20 steps, two first frames, one step of training at 202
    assert [row["step"] for row in rows(folder)][-2:] == ["200", "210"]
    assert rows(folder)[-1]["updates"] == str(210 // 4 - 40 // 4)


def test_a_signal_while_the_memory_is_refilled_ends_the_run(tmp_path, monkeypatch):
    folder = soft_dqn.train(tiny(soft_dqn, tmp_path, total_timesteps=200))["folder"]
    before, reset = checkpoint(soft_dqn, folder), soft_dqn.Atari.reset

    def interrupted(self, seeds):
        os.kill(os.getpid(), signal.SIGTERM)
        return reset(self, seeds)

    monkeypatch.setattr(soft_dqn.Atari, "reset", interrupted)
    with pytest.raises(SystemExit) as stop:
        soft_dqn.train(resumed(soft_dqn, folder, total_timesteps=300))
    assert stop.value.code == 143
    after = checkpoint(soft_dqn, folder)
    assert after["step"] == 200 and equal(before["net"], after["net"])


def test_a_saved_memory_is_restored_slot_by_slot(tmp_path):
    """Through saves of every size, around the ring, with a crash between a segment and its
    checkpoint; old segments go once nothing in the memory is theirs."""
    memory, rng = filled(2, 37, 3, folder=tmp_path)
    for steps in (1, 5, 0, 30, 2, 60, 1, 18, 18, 18):
        state = memory.state_dict()
        memory.settle(saved=True)
        files = {p.name for p in tmp_path.glob("replay-*")}
        listed = {memory.path(segment).name for segment in state["segments"]}
        assert listed <= files and len(listed) <= 2 + 37 // 3
        saved = {name: getattr(memory, name).clone()
                 for name in ("frame", "a", "r", "terminated", "last", "age", "head")}
        for _ in range(steps):
            memory.add(*random_step(rng, 2))
        (tmp_path / "replay-999999.bin").write_bytes(b"from a run that was killed in a save")
        other = soft_dqn.Replay(2, 37, torch.device("cpu"), tmp_path)
        other.load_state_dict(state)
        assert torch.equal(other.head, saved["head"])
        for i in range(2):
            used = min(37, int(saved["head"][i]))
            at = (saved["head"][i] - 1 - torch.arange(used)) % 37
            for name in ("frame", "last", "age"):
                assert torch.equal(getattr(other, name)[i, at], saved[name][i, at]), name
            for name in ("a", "r", "terminated"):  # the open slot has none of these yet
                assert torch.equal(getattr(other, name)[i, at[1:]], saved[name][i, at[1:]]), name
    assert memory.head.min() > 3 * 37 and not (tmp_path / "replay-000000.bin").exists()


def test_a_run_that_saves_its_memory_resumes_bit_equal_after_any_save(tmp_path, monkeypatch):
    """Twice killed; the memory, the networks, the optimizer and the rows are those of one run."""
    flags = dict(checkpoint_every=120, save_replay=True, n_step=3, buffer_size=150)
    whole = soft_dqn.train(tiny(soft_dqn, tmp_path / "whole", **flags))["folder"]
    args = tiny(soft_dqn, tmp_path / "broken", **flags)
    broken = train_until(soft_dqn, monkeypatch, args, 210)
    assert train_until(soft_dqn, monkeypatch, resumed(soft_dqn, broken), 390) == broken
    soft_dqn.train(resumed(soft_dqn, broken))
    assert rows(broken) == rows(whole)
    states = [checkpoint(soft_dqn, folder) for folder in (whole, broken)]
    for name in ("net", "target", "optimizer", "step", "last100", "games", "sums"):
        assert equal(states[0][name], states[1][name]), name
    memories = [soft_dqn.Replay(2, 75, torch.device("cpu"), Path(f)) for f in (whole, broken)]
    for memory, state in zip(memories, states):
        memory.load_state_dict(state["memory"])
    assert torch.equal(memories[0].head, memories[1].head) and memories[0].head.min() > 75
    assert torch.equal(memories[0].frame, memories[1].frame)


def test_segments_that_are_lost_or_damaged_are_refused(tmp_path, capsys):
    folder = Path(soft_dqn.train(tiny(soft_dqn, tmp_path, save_replay=True))["folder"])
    out = capsys.readouterr().out
    assert "--save-replay needs up to 0.01 GiB in" in out and "GiB are free" in out
    path = sorted(folder.glob("replay-*"))[-1]
    good = path.read_bytes()
    for content, text in ((good[:-1], "not as long"), (good[:-1] + b"\xff", "damaged"),
                          (None, "missing")):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(soft_dqn.Refused, match=text):
            soft_dqn.train(resumed(soft_dqn, folder, total_timesteps=500))
    path.write_bytes(good)
    assert soft_dqn.train(resumed(soft_dqn, folder, total_timesteps=420))["step"] == 420


def test_an_update_that_is_not_finite_changes_nothing_and_ends_the_run(tmp_path, monkeypatch):
    loss, calls, nets, count = soft_dqn.loss, [], [], soft_dqn.Run.count

    def spoilt(*rest):
        calls.append(1)
        return loss(*rest) * (math.nan if len(calls) > 12 else 1.0)

    def watched(self, *rest):
        nets.append({k: v.clone() for k, v in self.parts["net"].state_dict().items()})
        count(self, *rest)

    monkeypatch.setattr(soft_dqn, "loss", spoilt)
    monkeypatch.setattr(soft_dqn.Run, "count", watched)
    with pytest.raises(FloatingPointError, match="not finite.*loss nan.*last good"):
        soft_dqn.train(tiny(soft_dqn, tmp_path, checkpoint_every=80))
    assert equal(nets[11], nets[12]) and equal(nets[11], nets[-1])
    assert not equal(nets[10], nets[11])
    folder, = tmp_path.iterdir()
    assert checkpoint(soft_dqn, folder)["step"] == 80


def test_evaluation_needs_no_memory_for_replay(tmp_path, monkeypatch):
    folder = soft_dqn.train(tiny(soft_dqn, tmp_path, total_timesteps=60))["folder"]
    monkeypatch.setattr(soft_dqn, "free_bytes", lambda cuda: 0)
    saved = checkpoint(soft_dqn, folder)["args"]
    result = soft_dqn.train(soft_dqn.Args(**(saved | dict(evaluate=folder, eval_episodes=2))))
    assert result["episodes"] == 2 and result["policy"] == "epsilon-greedy 0.01"
