"""The paper's section 5, numerically: natural_pg_damped.py's own functions, float64 and real games.

Rows 36, 47, 54, 57 and 66-78. Every misprint has an assertion that its printed form fails.
"""
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import natural_pg_damped as script
from exact import MDP
from test_run import resumed, rows, tiny

TAU, EPS, LAMBDA, GAMMA = 0.3, 0.05, 0.1, 0.9
exact = pytest.mark.usefixtures("double")


class Policy:
    """A policy with a hidden layer on one-hot states, as a function of one row of parameters."""

    def __init__(self, mdp, seed, hidden=4):
        g = torch.Generator().manual_seed(seed)
        self.shapes = (mdp.S, hidden), (hidden, mdp.A)
        self.theta = torch.randn(sum(map(math.prod, self.shapes)), generator=g)

    def log_pi(self, theta):
        """(P,) -> log pi (S, A)."""
        trunk, head = (part.view(shape) for part, shape in
                       zip(theta.split([math.prod(x) for x in self.shapes]), self.shapes))
        return (trunk.tanh() @ head).log_softmax(-1)


class Problem:
    """A batch of states and actions, drawn at random, and everything that section 5 fixes."""

    def __init__(self, seed, B=40, S=4, A=3):
        g = torch.Generator().manual_seed(seed + 50)
        self.mdp, self.A, self.B = MDP(seed, S, A), A, B
        self.policy = Policy(self.mdp, seed + 100)
        self.theta = self.policy.theta
        self.s, self.a = torch.randint(S, (B,), generator=g), torch.randint(A, (B,), generator=g)
        self.Delta, self.V = torch.randn(2, B, generator=g)
        self.log_pi_old = self.log_pi(self.theta)  # (B, A)
        self.KL = script.kl_divergence(self.log_pi_old, self.log_pi_bar)
        self.log_ratio_old = self.log_ratio(self.theta)
        self.adv = script.q_step(self.Delta, self.log_ratio_old, self.KL, TAU)
        self.target = script.log_pi_target(self.taken(self.theta), self.adv, EPS, TAU)
        self.J = script.jacobian(self.log_pi, self.theta)
        dense = torch.func.jacrev(self.log_pi)(self.theta)  # (B, A, P)
        self.dense = dense
        self.Psi = dense[torch.arange(B), self.a]  # (B, P)

    @property
    def log_pi_bar(self):
        return self.mdp.log_pi_bar[self.s]

    def log_pi(self, theta):
        return self.policy.log_pi(theta)[self.s]

    def taken(self, theta):
        return script.at(self.log_pi(theta), self.a)

    def log_ratio(self, theta):
        return script.at(self.log_pi(theta) - self.log_pi_bar, self.a)

    def elsewhere(self, seed=0):
        return self.theta + torch.randn(len(self.theta), generator=torch.Generator().manual_seed(9))

    def q_loss(self, theta, V=None):
        return script.damped_q_loss(self.V if V is None else V, self.log_ratio(theta), self.V,
                                    self.log_ratio_old, self.adv, EPS, TAU)

    def x(self, damping=LAMBDA, iterations=60):
        return script.natural_gradient(self.J, self.a, self.adv, self.A, damping, iterations)[0]


@pytest.fixture(params=range(3))
def problem(request, double):
    return Problem(request.param)


def gauss_newton(residual, theta, damping):
    """-(J^T J / B + damping)^-1 J^T r / B of a vector of residuals, dense."""
    r, J = residual(theta), torch.func.jacrev(residual)(theta)
    F = J.T @ J / len(r) + damping * torch.eye(len(theta))
    return -torch.linalg.solve(F, J.T @ r / len(r))


def far(a, b):
    """Relative distance of two vectors."""
    return float((a - b).norm() / b.norm())


@exact
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_those_of_equations_36_47_and_54(seed, n):
    """Forward sums, one reward at a time, with lost lives, time limits and the rollout's end."""
    g, (T, N) = torch.Generator().manual_seed(seed), (7, 4)
    terminated, truncated = (torch.rand(2, T, N, generator=g) < 0.25).double()
    r, KL, V_final = torch.randn(3, T, N, generator=g)
    V, V_final = torch.randn(T + 1, N, generator=g), V_final * truncated
    delta = script.td_errors(r, KL, terminated, truncated, V, V_final, TAU, GAMMA)
    Delta = script.advantages(delta, torch.maximum(terminated, truncated), GAMMA, n)
    for t, i in np.ndindex(T, N):
        total, d = 0.0, 0
        while True:
            total += GAMMA**d * (r[t + d, i] - TAU * KL[t + d, i])
            if terminated[t + d, i]:
                break
            d += 1
            if truncated[t + d - 1, i]:
                total += GAMMA**d * V_final[t + d - 1, i]
                break
            if d == n or t + d == T:
                total += GAMMA**d * V[t + d, i]
                break
        assert abs(V[t, i] + Delta[t, i] - total) < 1e-12


def test_the_step_in_q_is_equations_75_and_76(problem):
    p = problem
    Q_hat = p.V + TAU * p.KL + p.Delta  # Eq. 47
    Q_old = p.V + TAU * p.log_ratio_old  # Eq. 57
    assert (p.adv - (Q_hat - Q_old)).abs().max() < 1e-14
    assert (p.adv - (p.Delta + TAU * (p.KL - p.log_ratio_old))).abs().max() < 1e-14
    minus = -TAU * p.KL + p.Delta - TAU * p.log_ratio_old  # with the sign of Eq. 60 as printed
    assert (p.adv - minus).abs().max() > 0.01


def test_without_reward_the_step_leads_to_the_reference_policy(problem):
    """eps = 1 and Delta = 0: the target of log pi is log pi_bar + KL_old, as below Eq. 73."""
    p = problem
    A = script.q_step(torch.zeros(p.B), p.log_ratio_old, p.KL, TAU)
    target = script.log_pi_target(p.taken(p.theta), A, 1.0, TAU)
    assert (target - script.at(p.log_pi_bar, p.a) - p.KL).abs().max() < 1e-13


def test_damped_q_loss_is_tau_squared_times_the_regression_everywhere(problem):
    """Row 78 at any theta, not to first order; each misprint of Eq. 78 is far off."""
    p = problem
    for theta in (p.theta, p.elsewhere()):
        log_pi, q_loss = p.taken(theta), p.q_loss(theta)
        assert (q_loss - TAU**2 * script.regression_loss(log_pi, p.target)).abs().max() < 1e-14
        no_inner_tau = script.log_pi_target(p.taken(p.theta), p.adv, EPS, 1.0)  # line 2 as printed
        assert (q_loss - TAU**2 * script.regression_loss(log_pi, no_inner_tau)).abs().max() > 1e-4
    assert (q_loss - script.regression_loss(log_pi, p.target)).abs().max() > 1e-2, "outer tau"
    line_1 = 0.5 * (p.V + p.log_ratio(theta) - p.V - p.log_ratio_old - EPS * p.adv).square()
    assert (q_loss - line_1).abs().max() > 1e-2, "line 1 as printed"


def test_value_that_moves_breaks_the_identity(problem):
    p, theta = problem, problem.elsewhere()
    moved = p.q_loss(theta, p.V + 0.1)
    assert (moved - TAU**2 * script.regression_loss(p.taken(theta), p.target)).abs().max() > 1e-3


def test_undamped_it_is_soft_q_learning(problem):
    """Rows 72 and 73: eps = 1 is the square of Q - y with y = V_old + tau KL_old + Delta."""
    p, theta = problem, problem.elsewhere()
    got = script.damped_q_loss(p.V, p.log_ratio(theta), p.V, p.log_ratio_old, p.adv, 1.0, TAU)
    y = p.V + TAU * p.KL + p.Delta
    assert (got - 0.5 * (p.V + TAU * p.log_ratio(theta) - y).square()).abs().max() < 1e-13  # 72
    short = 0.5 * (TAU * p.log_ratio(theta) - (p.Delta + TAU * p.KL)).square()
    assert (got - short).abs().max() < 1e-13  # 73


def test_gradient_of_either_loss_at_theta_old_is_the_policy_gradient(problem):
    p = problem
    g = script.policy_gradient(p.J, p.a, p.adv, p.A)
    assert (g - p.Psi.T @ p.adv / p.B).abs().max() < 1e-14
    of_q = torch.func.grad(lambda theta: p.q_loss(theta).mean())(p.theta)
    of_log = torch.func.grad(
        lambda theta: script.regression_loss(p.taken(theta), p.target).mean())(p.theta)
    assert (of_q + EPS * TAU * g).abs().max() < 1e-14
    assert (of_log + EPS / TAU * g).abs().max() < 1e-13


def expected(p, of):
    """E of a gradient over states, each alike, and a ~ pi, where of(J, a, s) is that of one."""
    total, pi = 0.0, p.policy.log_pi(p.theta).exp()
    for s, a in np.ndindex(*pi.shape):
        J = script.jacobian(lambda theta, s=s: p.policy.log_pi(theta)[[s]], p.theta)
        total = total + pi[s, a] / len(pi) * of(J, torch.tensor([a]), s)
    return total


def test_policy_gradient_is_equation_69_on_average_and_not_on_a_batch(problem):
    p, g = problem, torch.Generator().manual_seed(4)
    Delta = torch.randn(p.mdp.S, p.A, generator=g)
    log_pi = p.policy.log_pi(p.theta)
    KL = script.kl_divergence(log_pi, p.mdp.log_pi_bar)
    adv = script.q_step(Delta, log_pi - p.mdp.log_pi_bar, KL[:, None], TAU)  # (S, A)
    got = expected(p, lambda J, a, s: script.policy_gradient(J, a, adv[s, a], p.A))

    def objective(theta, sign=-1.0):  # Eq. 69, ascent
        new = p.policy.log_pi(theta)
        KL = script.kl_divergence(new, p.mdp.log_pi_bar)
        return ((log_pi.exp() * new * Delta).sum(-1) + sign * TAU * KL).mean()

    assert (got - torch.func.grad(objective)(p.theta)).abs().max() < 1e-14
    assert (got - torch.func.grad(objective)(p.theta, 1.0)).abs().max() > 1e-3, "sign"
    assert (got - torch.func.grad(objective)(p.theta, 0.0)).abs().max() > 1e-3, "no KL: Eq. 52"
    batch = script.policy_gradient(p.J, p.a, p.adv, p.A)

    def on_batch(theta):
        KL = script.kl_divergence(p.log_pi(theta), p.log_pi_bar)
        return (p.taken(theta) * p.Delta - TAU * KL).mean()

    assert (batch - torch.func.grad(on_batch)(p.theta)).abs().max() > 1e-3


def test_fisher_matrices_are_the_dense_ones(problem):
    p, g = problem, torch.Generator().manual_seed(5)
    v, w = torch.randn(2, len(p.theta), generator=g)
    assert (script.sampled_fisher(p.J, p.a, v) - p.Psi.T @ (p.Psi @ v) / p.B).abs().max() < 1e-13
    F_all = torch.einsum("ba,bap,baq->pq", p.log_pi_old.exp(), p.dense, p.dense) / p.B
    assert abs(script.all_action_fisher(p.J, p.log_pi_old, v, w) - v @ F_all @ w) < 1e-13
    mean = expected(p, lambda J, a, s: script.sampled_fisher(J, a, v))
    everywhere = script.jacobian(p.policy.log_pi, p.theta)
    all_actions = script.all_action_fisher(everywhere, p.policy.log_pi(p.theta), v, w)
    assert abs(mean @ w - all_actions) < 1e-13, "they agree on average over actions"


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_conjugate_gradients_equal_a_dense_solve(problem, damping):
    p = problem
    F = p.Psi.T @ p.Psi / p.B + damping * torch.eye(len(p.theta))
    dense = torch.linalg.solve(F, p.Psi.T @ p.adv / p.B)
    x, residual, iterations = script.natural_gradient(p.J, p.a, p.adv, p.A, damping, 200)
    assert far(x, dense) < 1e-8 and residual < 1e-8 and 1 < iterations < 60
    for k in (1, 3):  # cut off before the end: the residual is the true one
        x, residual, iterations = script.natural_gradient(p.J, p.a, p.adv, p.A, damping, k)
        g = p.Psi.T @ p.adv / p.B
        assert abs(residual - (F @ x - g).norm() / g.norm()) < 1e-10 and iterations == k
        assert far(x, dense) > 1e-6


@exact
def test_conjugate_gradients_leave_a_zero_gradient_alone():
    x, residual, iterations = script.conjugate_gradient(lambda v: 2 * v, torch.zeros(4), 5)
    assert torch.equal(x, torch.zeros(4)) and residual == 0 and iterations == 0


def test_one_gauss_newton_step_on_either_loss_is_the_natural_gradient_step(problem):
    """Rows 66, 71, 78: eps/tau (F_hat + lambda)^-1 g_hat, with lambda tau^2 on the side of Q."""
    p = problem
    step = EPS / TAU * p.x()

    def in_log_pi(theta):
        return p.taken(theta) - p.target

    def in_q(theta):  # the residual of damped_q_loss, with its sign
        sign = torch.sign(p.log_ratio(theta) - p.log_ratio_old - EPS / TAU * p.adv).detach()
        return sign * (2 * p.q_loss(theta)).sqrt()

    assert far(gauss_newton(in_log_pi, p.theta, LAMBDA), step) < 1e-8
    assert far(gauss_newton(in_q, p.theta, TAU**2 * LAMBDA), step) < 1e-8
    assert far(gauss_newton(in_q, p.theta, LAMBDA), step) > 0.03, "lambda of the other side"
    assert far(EPS * p.x(), step) > 0.5, "eps in place of eps / tau"

    def printed(theta):  # pi_theta inside the target
        A = p.Delta - TAU * (p.log_ratio(theta) - p.KL)
        return p.taken(theta) - p.taken(p.theta).detach() - EPS / TAU * A

    assert far(gauss_newton(printed, p.theta, 1e-9), gauss_newton(in_log_pi, p.theta, 1e-9)) > 0.01
    shrunk = gauss_newton(in_log_pi, p.theta, 0.05) / (1 + EPS)  # eps of Eq. 71 is eps / tau here
    assert far(gauss_newton(printed, p.theta, 0.05 * (1 + EPS) ** 2), shrunk) < 1e-10


def test_equation_66_counts_eps_once(problem):
    """With w of Eq. 66, which holds eps, the step of Eq. 67 as printed, eps w, is eps too short."""
    p = problem
    step = EPS / TAU
    w = step * p.x(1e-6)  # least squares solution of Eq. 66 with that step
    moved = p.J.times(w)[torch.arange(p.B), p.a]
    fit = p.Psi @ torch.linalg.lstsq(p.Psi, step * p.adv, driver="gelsd").solution
    assert far(moved, fit) < 1e-3
    assert far(step * moved, fit) == pytest.approx(1 - step, abs=1e-3)


def test_the_minimum_and_the_step_differ_by_eps_squared(problem):
    """Row 71: many passes of the nonlinear fit are a natural gradient step only for small eps."""
    p, gaps = problem, []
    for eps in (1e-2, 5e-3, 2.5e-3):
        target = script.log_pi_target(p.taken(p.theta), p.adv, eps, TAU)
        theta = p.theta
        for _ in range(60):  # Gauss-Newton to the minimum, in log pi, of which few directions move
            J = torch.func.jacrev(p.taken)(theta)
            r = p.taken(theta) - target
            theta = theta - torch.linalg.lstsq(J, r, rcond=1e-9, driver="gelsd").solution
        linear = torch.linalg.lstsq(p.Psi, eps / TAU * p.adv, rcond=1e-9, driver="gelsd").solution
        predicted = p.log_pi_old + p.J.times(linear)
        gaps.append(float((p.log_pi(theta) - predicted).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.1)


def test_kl_of_the_step_is_quadratic_and_eps_for_kl_inverts_it(problem):
    p, x = problem, problem.x()
    xFx = script.all_action_fisher(p.J, p.log_pi_old, x, x)
    errors = []
    for eps in (2e-3, 1e-3):
        new = p.log_pi(p.theta + eps / TAU * x)
        moved = script.kl_divergence(p.log_pi_old, new).mean()
        errors.append(abs(moved / script.quadratic_kl(eps, TAU, xFx) - 1))
    assert errors[1] < 0.6 * errors[0] < 0.05, "the error vanishes with eps"
    eps = script.eps_for_kl(1e-3, TAU, xFx)
    assert abs(script.quadratic_kl(eps, TAU, xFx) - 1e-3) < 1e-15
    assert abs(eps - TAU * math.sqrt(2e-3 / xFx)) < 1e-15
    assert torch.isfinite(script.eps_for_kl(1e-3, TAU, torch.zeros(())))


# networks

@pytest.mark.parametrize("value, moved", [("separate", 0), ("head", 0), ("shared", 8)])
def test_which_parameters_each_fit_moves(value, moved):
    """By default the value fit may not move the policy."""
    torch.manual_seed(0)
    net = script.PolicyAndValue(5, value)
    pi, V = net.names("pi"), net.names("V")
    assert len(pi) == 10 and len(set(pi) & set(V)) == moved and set(pi) | set(V) == {
        name for name, _ in net.named_parameters()}
    obs = torch.randint(256, (6, 4, 84, 84), dtype=torch.uint8)
    log_pi, values = net(obs), net.V(obs)
    assert log_pi.shape == (6, 5) and values.shape == (6,)
    got = torch.autograd.grad(values.sum(), net.of("V"))
    assert all(g.abs().max() > 0 for g in got)
    before = net(obs)
    args = script.Args(max_grad_norm=0.5)
    for _ in range(3):
        script.descend(net.V(obs).square().mean(), script.adam_of(net.of("V"), obs.device), 1e-3,
                       args)
    assert not torch.equal(net.V(obs), values)
    assert torch.equal(net(obs), before) == (value != "shared")


def test_flat_and_set_flat_invert_each_other():
    net = script.PolicyAndValue(5, "separate").to(memory_format=torch.channels_last)
    theta = script.flat(net.of("pi"))
    script.set_flat(net.of("pi"), theta + 1)
    assert torch.equal(script.flat(net.of("pi")), theta + 1)
    script.set_flat(net.of("pi"), theta)
    torch.testing.assert_close(net.actor.trunk[0].weight.flatten(), theta[:8192])


def filled_batch(net, A, B=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(256, (B, 4, 84, 84), dtype=torch.uint8, generator=g)
    a = torch.randint(A, (B,), generator=g)
    with torch.no_grad():
        log_pi = net(s)
    adv = torch.randn(B, generator=g)
    return script.Batch(s, a, log_pi, script.at(log_pi, a), adv, adv, adv)


def test_solve_finds_the_natural_gradient_of_the_network():
    """Against a dense solve in the space of samples: x = Psi^T (Psi Psi^T + B lambda)^-1 A."""
    torch.manual_seed(1)
    net = script.PolicyAndValue(4, "separate").to(memory_format=torch.channels_last)
    old, args = filled_batch(net, 4), script.Args(damping=0.05, cg_iterations=40)
    solution = script.solve(net, old, args)
    taken = script.at(net(old.s), old.a)
    Psi = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        y, net.of("pi"), retain_graph=True)]) for y in taken]).double()
    B = len(old.a)
    kernel = Psi @ Psi.T + B * args.damping * torch.eye(B)
    x = Psi.T @ torch.linalg.solve(kernel, old.A.double())
    assert far(solution.x.double(), x) < 1e-3 and solution.residual < 1e-3
    moved = script.jacobian  # J of the solution is that of the batch
    assert moved and far(script.at(solution.J.times(solution.x), old.a).double(), Psi @ x) < 1e-3


def test_adam_is_torchs_and_leaves_out_what_is_not_finite():
    """The fused one on channels-last weights against the plain one, some steps of each."""
    torch.manual_seed(2)
    net = script.PolicyAndValue(4, "separate").to(memory_format=torch.channels_last)
    other = script.PolicyAndValue(4, "separate")
    other.load_state_dict(net.state_dict())
    old, args = filled_batch(net, 4), script.Args(max_grad_norm=0.1)
    adam = script.adam_of(net.of("pi"), torch.device("cpu"))
    plain = torch.optim.Adam(other.of("pi"), lr=1e-3, eps=1e-5)
    for step in range(4):
        factor = math.nan if step == 2 else 1.0
        kept = script.flat(net.of("pi"))
        L = factor * script.regression_loss(script.at(net(old.s), old.a), old.A).mean()
        assert script.descend(L, adam, 1e-3, args).isfinite() == (step != 2)
        if step == 2:
            assert torch.equal(script.flat(net.of("pi")), kept)
            continue
        plain.zero_grad()
        script.regression_loss(script.at(other(old.s), old.a), old.A).mean().backward()
        nn.utils.clip_grad_norm_(other.of("pi"), 0.1)
        plain.step()
        assert not torch.equal(script.flat(net.of("pi")), kept)
    torch.testing.assert_close(script.flat(net.of("pi")), script.flat(other.of("pi")),
                               rtol=0, atol=2e-5)


def test_minibatches_are_a_new_permutation_in_every_pass():
    g = torch.Generator().manual_seed(0)
    found = list(script.minibatches(3, 10, 4, g))
    assert [len(i) for i in found] == [4, 4, 2] * 3
    passes = [torch.cat(found[k:k + 3]) for k in (0, 3, 6)]
    assert all(sorted(p.tolist()) == list(range(10)) for p in passes)
    assert not torch.equal(passes[0], passes[1])


# real games

def measured(folder, name="metrics.csv"):
    with open(Path(folder) / name, newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


# In Breakout's black frames, with biases of 0, ReLUs stand exactly in their kinks before training.
REAL = dict(env_id="ALE/Krull-v5", total_timesteps=192, log_every=64, measure_every=1,
            num_envs=4, num_steps=16, n_step=8, minibatch_size=32, schedule_timesteps=10_000,
            eps=1e-4, cg_iterations=10)


@pytest.mark.parametrize("flags", [dict(solver="cg"), dict(solver="regression"),
                                   dict(solver="cg", regularizer="kl", value="head"),
                                   dict(solver="regression", value="shared")], ids=str)
def test_kl_moved_on_real_games_is_the_predicted(tmp_path, flags):
    """Within 20% of 1/2 d^T F_all d, and of what conjugate gradients predict for their own step."""
    small = dict(REAL, learning_rate=1e-5, value_learning_rate=1e-5)  # Adam's steps have its size
    folder = script.train(tiny(script, tmp_path, **small, **flags))["folder"]
    found = measured(folder)
    assert len(found) == 3
    for row in found:
        assert row["kl_measured"] == pytest.approx(row["kl_quadratic"], rel=0.2)
        assert row["kl_moved"] == pytest.approx(row["kl_measured"], rel=1e-3)
        assert row["kl_refit"] == pytest.approx(row["kl_refit_quadratic"], rel=0.2)
        assert abs(row["cosine"]) < 1.0001 and abs(row["cosine_fisher"]) < 1.0001
        if flags["solver"] == "cg":
            assert row["kl_measured"] == pytest.approx(row["kl_predicted"], rel=0.2)
            assert row["cosine"] == pytest.approx(1, abs=1e-3)
            assert row["norm_ratio"] == pytest.approx(1, abs=1e-2)
            assert row["cg_iterations"] == 10 and row["cg_seconds"] > 0
        else:
            assert found[0]["cosine"] > 0 and found[0]["cosine_fisher"] > 0, "uphill, at the first"
        refitted = flags.get("value") == "shared"
        assert (row["kl_refit"] != row["kl_measured"]) == refitted


@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_target_kl_sets_eps(tmp_path, solver):
    """The KL that is predicted is the one that was asked for, less the square of the decay."""
    flags = dict(REAL, target_kl=1e-6, solver=solver, eps=0.5)
    folder = script.train(tiny(script, tmp_path, **flags))["folder"]
    for row in measured(folder):
        left = 1 - (row["step"] - 64) / 10_000
        assert row["kl_predicted"] == pytest.approx(1e-6 * left**2, rel=1e-4)
        assert 0 < row["eps"] < 0.01
        if solver == "cg":
            assert row["kl_measured"] == pytest.approx(row["kl_predicted"], rel=0.2)


def test_passes_come_closer_to_the_minimum(tmp_path):
    """More passes at a larger step leave less of the damped Q loss; none of it with eps = 0."""
    left = []
    for passes in (1, 20):
        flags = dict(REAL, passes=passes, learning_rate=1e-3, eps=2e-3, measure_every=0)
        folder = script.train(tiny(script, tmp_path / str(passes), **flags))["folder"]
        left.append(measured(folder)[0]["residual"])
        assert math.isnan(measured(folder)[0]["cosine"])
    assert left[1] < 0.5 * left[0]
    folder = script.train(tiny(script, tmp_path, **dict(REAL, eps=0.0, passes=1)))["folder"]
    assert all(math.isfinite(row["cosine"]) for row in measured(folder))


def test_measuring_does_not_disturb(tmp_path):
    folders = [script.train(tiny(script, tmp_path / str(k), **flags))["folder"]
               for k in (0, 2) for flags in [dict(REAL, measure_every=k)]]
    nets = [script.read_checkpoint(folder)["net"] for folder in folders]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    same = "policy_loss", "value_loss", "kl_moved", "residual", "score_mean"
    assert [[row[k] for k in same] for row in rows(folders[0])] == [
        [row[k] for k in same] for row in rows(folders[1])]


def test_time_limits_bootstrap_and_lost_lives_do_not(tmp_path, monkeypatch):
    td_errors, seen = script.td_errors, []

    def watched(r, KL, terminated, truncated, V, V_final, *rest):
        seen.append((truncated.clone(), V_final.clone()))
        return td_errors(r, KL, terminated, truncated, V, V_final, *rest)

    monkeypatch.setattr(script, "td_errors", watched)
    script.train(tiny(script, tmp_path, env_id="ALE/Pong-v5", max_episode_frames=120))
    cut, V = (torch.stack(x) for x in zip(*seen))
    assert cut.sum() > 4 and torch.equal(V != 0, cut > 0)


@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_an_update_that_is_not_finite_changes_nothing_and_ends_the_run(tmp_path, solver,
                                                                       monkeypatch):
    q_step, calls, nets = script.q_step, [], []

    def spoilt(*args):
        calls.append(1)
        return q_step(*args) * (math.nan if len(calls) > 2 else 1.0)

    count = script.Run.count

    def watched(self, *rest):
        nets.append(script.flat(self.parts["net"].of("pi")))
        count(self, *rest)

    monkeypatch.setattr(script, "q_step", spoilt)
    monkeypatch.setattr(script.Run, "count", watched)
    args = tiny(script, tmp_path, **dict(REAL, log_every=1000, total_timesteps=320, solver=solver))
    with pytest.raises(FloatingPointError, match=r"not finite.*\(policy_loss nan"):
        script.train(args)
    assert len(nets) == 5 and not torch.equal(nets[0], nets[1])
    assert torch.equal(nets[1], nets[2]) and torch.equal(nets[1], nets[4])


@pytest.mark.parametrize("flags", [dict(solver="cg", value="head"), dict(target_kl=1e-4),
                                   dict(value="shared", regularizer="kl")], ids=str)
def test_other_arms_resume_bit_for_bit(tmp_path, flags, monkeypatch):
    from test_run import equal, train_until
    flags = dict(REAL, num_envs=2, checkpoint_every=64, **flags)
    whole = script.train(tiny(script, tmp_path / "whole", **flags))["folder"]
    broken = train_until(script, monkeypatch, tiny(script, tmp_path / "broken", **flags), 96)
    script.train(resumed(script, broken))
    a, b = (script.read_checkpoint(folder)["net"] for folder in (whole, broken))
    assert equal(a, b)


@pytest.mark.parametrize("flags, text", [
    (dict(tau=0.0), "--tau 0.0 is not between"), (dict(eps=1.5), "--eps 1.5"),
    (dict(target_kl=-1.0), "--target-kl"), (dict(damping=-0.1), "--damping"),
    (dict(cg_iterations=0), "--cg-iterations"), (dict(passes=0), "--passes"),
    (dict(minibatch_size=0), "--minibatch-size"), (dict(n_step=0), "--n-step"),
    (dict(value_passes=0), "--value-passes"), (dict(measure_every=-1), "--measure-every")])
def test_bad_flags_are_refused(tmp_path, flags, text):
    with pytest.raises(script.Refused, match=text):
        script.train(tiny(script, tmp_path, **flags))
    assert not list(tmp_path.iterdir())
