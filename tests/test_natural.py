"""The paper's section 5, numerically: natural_pg_damped.py's own functions, float64 and real games.

Rows 36, 47, 54, 57 and 66-78. Every misprint has an assertion that its printed form fails.
"""
import csv
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import natural_pg_damped as script
from equations.natural import EPS, LAMBDA, TAU, Problem, gauss_newton
from test_run import equal, resumed, rows, tiny, train_until

GAMMA = 0.9
exact = pytest.mark.usefixtures("double")


@pytest.fixture(params=range(3))
def problem(request, double):
    return Problem(request.param)


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
    for theta in (p.theta, p.elsewhere):
        log_pi, q_loss = p.taken(theta), p.q_loss(theta)
        assert (q_loss - TAU**2 * script.regression_loss(log_pi, p.target)).abs().max() < 1e-14
        no_inner_tau = script.log_pi_target(p.taken(p.theta), p.adv, EPS, 1.0)  # line 2 as printed
        assert (q_loss - TAU**2 * script.regression_loss(log_pi, no_inner_tau)).abs().max() > 1e-4
    assert (q_loss - script.regression_loss(log_pi, p.target)).abs().max() > 1e-2, "outer tau"
    line_1 = 0.5 * (p.V + p.log_ratio(theta) - p.V - p.log_ratio_old - EPS * p.adv).square()
    assert (q_loss - line_1).abs().max() > 1e-2, "line 1 as printed"


def test_value_that_moves_breaks_the_identity(problem):
    p, theta = problem, problem.elsewhere
    moved = p.q_loss(theta, p.V + 0.1)
    assert (moved - TAU**2 * script.regression_loss(p.taken(theta), p.target)).abs().max() > 1e-3


def test_undamped_it_is_soft_q_learning(problem):
    """Rows 72 and 73: eps = 1 is the square of Q - y with y = V_old + tau KL_old + Delta."""
    p, theta = problem, problem.elsewhere
    got = script.damped_q_loss(p.V, p.log_ratio(theta), p.V, p.log_ratio_old, p.adv, 1.0, TAU)
    y = p.V + TAU * p.KL + p.Delta
    assert (got - 0.5 * (p.V + TAU * p.log_ratio(theta) - y).square()).abs().max() < 1e-13  # 72
    short = 0.5 * (TAU * p.log_ratio(theta) - (p.Delta + TAU * p.KL)).square()
    assert (got - short).abs().max() < 1e-13  # 73


def test_gradient_of_either_loss_at_theta_old_is_the_policy_gradient(problem):
    p = problem
    g = script.policy_gradient(p.J, p.adv)
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
        taken = torch.tensor([a])
        J = script.jacobian(lambda theta, s=s: p.policy.log_pi(theta)[[s]], p.theta, taken)
        total = total + pi[s, a] / len(pi) * of(J, taken, s)
    return total


def test_policy_gradient_is_equation_69_on_average_and_not_on_a_batch(problem):
    p, g = problem, torch.Generator().manual_seed(4)
    Delta = torch.randn(p.mdp.S, p.A, generator=g)
    log_pi = p.policy.log_pi(p.theta)
    KL = script.kl_divergence(log_pi, p.mdp.log_pi_bar)
    adv = script.q_step(Delta, log_pi - p.mdp.log_pi_bar, KL[:, None], TAU)  # (S, A)
    got = expected(p, lambda J, a, s: script.policy_gradient(J, adv[s, a]))

    def objective(theta, sign=-1.0):  # Eq. 69, ascent
        new = p.policy.log_pi(theta)
        KL = script.kl_divergence(new, p.mdp.log_pi_bar)
        return ((log_pi.exp() * new * Delta).sum(-1) + sign * TAU * KL).mean()

    assert (got - torch.func.grad(objective)(p.theta)).abs().max() < 1e-14
    assert (got - torch.func.grad(objective)(p.theta, 1.0)).abs().max() > 1e-3, "sign"
    assert (got - torch.func.grad(objective)(p.theta, 0.0)).abs().max() > 1e-3, "no KL: Eq. 52"
    batch = script.policy_gradient(p.J, p.adv)

    def on_batch(theta):
        KL = script.kl_divergence(p.log_pi(theta), p.log_pi_bar)
        return (p.taken(theta) * p.Delta - TAU * KL).mean()

    assert (batch - torch.func.grad(on_batch)(p.theta)).abs().max() > 1e-3


def test_fisher_matrices_are_the_dense_ones(problem):
    p, g = problem, torch.Generator().manual_seed(5)
    v, w = torch.randn(2, len(p.theta), generator=g)
    assert (script.sampled_fisher(p.J, v) - p.Psi.T @ (p.Psi @ v) / p.B).abs().max() < 1e-13
    F_all = torch.einsum("ba,bap,baq->pq", p.log_pi_old.exp(), p.dense, p.dense) / p.B
    found = script.all_action_fisher(p.log_pi_old, p.J.times(v), p.J.times(w))
    assert abs(found - v @ F_all @ w) < 1e-13
    mean = expected(p, lambda J, a, s: script.sampled_fisher(J, v))
    Jv, Jw = (torch.func.jvp(p.policy.log_pi, (p.theta,), (x,))[1] for x in (v, w))
    all_actions = script.all_action_fisher(p.policy.log_pi(p.theta), Jv, Jw)
    assert abs(mean @ w - all_actions) < 1e-13, "they agree on average over actions"


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_conjugate_gradients_equal_a_dense_solve(problem, damping):
    p = problem
    F = p.Psi.T @ p.Psi / p.B + damping * torch.eye(len(p.theta))
    dense = torch.linalg.solve(F, p.Psi.T @ p.adv / p.B)
    x, residual, iterations = script.natural_gradient(p.J, p.adv, damping, 200)
    assert far(x, dense) < 1e-8 and residual < 1e-8 and 1 < iterations < 60
    for k in (1, 3):  # cut off before the end: the residual is the true one
        x, residual, iterations = script.natural_gradient(p.J, p.adv, damping, k)
        g = p.Psi.T @ p.adv / p.B
        assert abs(residual - (F @ x - g).norm() / g.norm()) < 1e-10 and iterations == k
        assert far(x, dense) > 1e-6


@exact
def test_conjugate_gradients_leave_a_zero_gradient_alone():
    x, residual, iterations = script.conjugate_gradient(lambda v: 2 * v, torch.zeros(4), 5)
    assert torch.equal(x, torch.zeros(4)) and residual == 0 and iterations == 0
    x, residual, iterations = script.conjugate_gradient(lambda v: 0 * v, torch.ones(4), 5)
    assert torch.equal(x, torch.zeros(4)) and residual == 1 and iterations == 0


@exact
def test_conjugate_gradients_leave_out_a_direction_of_no_curvature():
    """x stays as it is, and the next iteration goes down what is left of the gradient."""
    M, g = torch.diag(torch.tensor([2.0, 1.0, 0.5, -0.7])), torch.tensor([0.7, 0.3, 0.1, 0.6])
    xs, made = [torch.zeros(4)], [0]
    for k in range(1, 5):
        x, _, iterations = script.conjugate_gradient(lambda v: M @ v, g, k)
        xs, made = [*xs, x], [*made, int(iterations)]
    assert made == [0, 1, 1, 2, 2] and torch.equal(xs[2], xs[1])
    left = g - M @ xs[1]
    assert far(xs[3], xs[1] + (left @ left) / (left @ M @ left) * left) < 1e-10


@exact
def test_conjugate_gradients_stop_at_their_tolerance():
    M = torch.diag(torch.linspace(1, 3, 20))
    for tolerance, g in itertools.product((0.1, 1e-3, 1e-6), (torch.ones(20), torch.ones(20) * 50)):
        x, residual, made = script.conjugate_gradient(lambda v: M @ v, g, 50, tolerance)
        assert residual <= tolerance
        _, before, _ = script.conjugate_gradient(lambda v: M @ v, g, int(made) - 1, tolerance)
        assert before > tolerance
    x, _, made = script.conjugate_gradient(lambda v: 4 * v, torch.ones(1), 5)  # one parameter
    assert x == 0.25 and made == 1


def test_all_action_fisher_sums_over_the_last_axis():
    log_pi, Jv, Jw = torch.randn(3, 2, 5, 4).unbind()
    log_pi = log_pi.log_softmax(-1)
    each = [script.all_action_fisher(*x) for x in zip(log_pi, Jv, Jw)]
    assert abs(script.all_action_fisher(log_pi, Jv, Jw) - sum(each) / 2) < 1e-6


def test_actions_are_drawn_along_the_last_axis():
    log_pi = torch.tensor([0.2, 0.5, 0.3]).log().expand(2, 5, 3)
    gumbel = torch.zeros(2, 5, 3)
    gumbel[1, :, 2] = 1.0
    assert script.sample(log_pi, gumbel).tolist() == [[1] * 5, [2] * 5]


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
    Jx = p.J.times(x)
    xFx = script.all_action_fisher(p.log_pi_old, Jx, Jx)
    errors = []
    for eps in (2e-3, 1e-3):
        new = p.log_pi(p.theta + eps / TAU * x)
        moved = script.kl_divergence(p.log_pi_old, new).mean()
        errors.append(abs(moved / script.quadratic_kl(eps, TAU, xFx) - 1))
    assert errors[1] < 0.6 * errors[0] < 0.05, "the error vanishes with eps"
    eps = script.eps_for_kl(1e-3, TAU, xFx)
    assert abs(script.quadratic_kl(eps, TAU, xFx) - 1e-3) < 1e-15
    assert abs(eps - TAU * math.sqrt(2e-3 / xFx)) < 1e-15
    assert script.eps_for_kl(1e-3, TAU, torch.zeros(())) == 1, "no more than the whole of Q_hat"


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
        script.descend(net.V(obs).square().mean(), script.adam_of(net.of("V"), 1e-3, obs.device),
                       args)
    assert not torch.equal(net.V(obs), values)
    assert torch.equal(net(obs), before) == (value != "shared")


def test_move_adds_a_step_and_only_a_finite_one():
    net = script.PolicyAndValue(5, "separate").to(memory_format=torch.channels_last)
    theta = script.flat(net.of("pi"))
    torch.testing.assert_close(net.actor.trunk[0].weight.flatten(), theta[:8192])
    step = torch.arange(len(theta)) / len(theta)
    assert script.move(net.of("pi"), step)
    assert torch.equal(script.flat(net.of("pi")), theta + step)
    step[7] = math.nan
    assert not script.move(net.of("pi"), step)
    assert torch.equal(script.flat(net.of("pi")), theta + step.nan_to_num(7 / len(theta)))


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
    solution, seconds = script.solve(net, old, args)
    assert seconds > 0
    taken = script.at(net(old.s), old.a)
    Psi = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        y, net.of("pi"), retain_graph=True)]) for y in taken]).double()
    B = len(old.a)
    kernel = Psi @ Psi.T + B * args.damping * torch.eye(B)
    x = Psi.T @ torch.linalg.solve(kernel, old.A.double())
    assert far(solution.x.double(), x) < 1e-3 and solution.residual < 1e-3
    assert far(script.at(solution.Jx, old.a).double(), Psi @ x) < 1e-3
    assert far(solution.J.Psi(solution.x).double(), Psi @ x) < 1e-3


def test_adam_is_torchs_and_leaves_out_what_is_not_finite():
    """The fused one on channels-last weights against the plain one, some steps of each."""
    torch.manual_seed(2)
    net = script.PolicyAndValue(4, "separate").to(memory_format=torch.channels_last)
    other = script.PolicyAndValue(4, "separate")
    other.load_state_dict(net.state_dict())
    old, args = filled_batch(net, 4), script.Args(max_grad_norm=0.1)
    adam = script.adam_of(net.of("pi"), 1e-3, torch.device("cpu"))
    plain = torch.optim.Adam(other.of("pi"), lr=1e-3, eps=1e-5)
    for step in range(4):
        factor = math.nan if step == 2 else 1.0
        kept = script.flat(net.of("pi"))
        L = factor * script.regression_loss(script.at(net(old.s), old.a), old.A).mean()
        assert script.descend(L, adam, args).isfinite() == (step != 2)
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
            eps=1e-4, cg_iterations=10, passes=4, value_passes=2)


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
    """More passes leave less of the damped Q loss."""
    left = []
    for passes in (1, 20):
        flags = dict(REAL, passes=passes, learning_rate=1e-3, eps=0.05, measure_every=0)
        folder = script.train(tiny(script, tmp_path / str(passes), **flags))["folder"]
        left.append(measured(folder)[0]["residual"])
        assert math.isnan(measured(folder)[0]["cosine"])
    assert left[1] < 0.7 * left[0], left


def test_what_train_puts_together(tmp_path, monkeypatch):
    """Two rollouts, recomputed from what they hold: observations, rewards, KL, V, targets."""
    seen, played, nets, args = [], [], [], dict(REAL, total_timesteps=128, value_passes=1)
    batch, step = script.Batch, script.Atari.step
    td_errors, network = script.td_errors, script.PolicyAndValue

    def copied(*parts):
        state = {k: v.clone() for k, v in nets[-1].state_dict().items()}
        seen.append((batch(*(x.clone() for x in parts)), state))
        return batch(*parts)

    def stepped(self, actions):
        result = step(self, actions)
        result[1][1] = -7.0 * (len(played) % 3 == 0)  # or no reward would come in 32 steps
        played.append((torch.from_numpy(result[0].copy()), result[1].copy(), actions.copy()))
        return result

    def watched(r, KL, terminated, *rest):
        played.append((r.clone(), KL.clone()))
        return td_errors(r, KL, terminated, *rest)

    monkeypatch.setattr(script, "Batch", copied)
    monkeypatch.setattr(script.Atari, "step", stepped)
    monkeypatch.setattr(script, "td_errors", watched)
    monkeypatch.setattr(script, "PolicyAndValue", lambda *a: nets.append(network(*a)) or nets[-1])
    folder = script.train(tiny(script, tmp_path, **args, regularizer="kl"))["folder"]
    for k, (old, state) in enumerate(seen):
        nets[0].load_state_dict(state)
        steps, (r, KL) = played[17 * k:17 * k + 16], played[17 * k + 16]
        s = old.s.view(16, 4, 4, 84, 84)
        for t in range(16):
            if k or t:  # what the emulator gave before
                before = played[17 * k + t - 1] if t else played[17 * k - 2]
                assert torch.equal(s[t], before[0])
            assert torch.equal(r[t], torch.from_numpy(np.sign(steps[t][1])).float())
            assert old.a.view(16, 4)[t].tolist() == steps[t][2].tolist()
        with torch.no_grad():
            log_pi, V = nets[0](old.s), nets[0].V(old.s)
        torch.testing.assert_close(old.log_pi, log_pi, rtol=0, atol=1e-5)
        torch.testing.assert_close(old.V, V, rtol=0, atol=1e-5)
        A = log_pi.shape[-1]
        log_ratio = script.at(log_pi, old.a) + math.log(A)
        expected = math.log(A) + (log_pi.exp() * log_pi).sum(-1)
        torch.testing.assert_close(KL.flatten(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(old.log_ratio, log_ratio, rtol=0, atol=1e-5)
        A_t = script.q_step(old.V_hat - old.V, log_ratio, expected, 0.01)
        torch.testing.assert_close(old.A, A_t, rtol=0, atol=1e-4)
        row = measured(folder)[k]
        assert row["V_hat"] == pytest.approx(float(old.V_hat.mean()), rel=1e-4)
        assert row["entropy"] == pytest.approx(math.log(A) - float(KL.mean()), rel=1e-4)
        assert row["KL_uniform"] == pytest.approx(float(KL.mean()), rel=1e-2)
        variance = float((old.V_hat - old.V).var(correction=0) / old.V_hat.var(correction=0))
        assert row["explained_variance"] == pytest.approx(1 - variance, abs=1e-4)
        value_loss = float(0.5 * (old.V_hat - old.V).square().mean())
        assert 0.5 * value_loss < row["value_loss"] < 1.5 * value_loss
    assert len(seen) == 2


def test_actions_follow_the_noise_of_their_own_step(tmp_path, monkeypatch):
    """Every action is that of its log pi and of its slice of the noise, drawn at the start."""
    drawn, seen = [], []
    gumbel_noise, batch = script.gumbel_noise, script.Batch
    monkeypatch.setattr(script, "gumbel_noise", lambda *a: drawn.append(gumbel_noise(*a)) or
                        drawn[-1])
    monkeypatch.setattr(script, "Batch", lambda *parts: seen.append(batch(*parts)) or seen[-1])
    script.train(tiny(script, tmp_path, **dict(REAL, total_timesteps=64)))
    assert (drawn[0] > 0).double().mean() == pytest.approx(1 - math.exp(-1), abs=0.05)  # its sign
    expected = (seen[0].log_pi + drawn[0].flatten(0, 1)).argmax(-1)
    assert torch.equal(seen[0].a, expected) and len(set(expected.tolist())) > 5


@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_eps_and_step_sizes_decay_to_nothing(tmp_path, solver):
    """Linearly over the schedule; past it neither fit moves anything."""
    flags = dict(REAL, schedule_timesteps=128, total_timesteps=256, solver=solver, eps=1e-3)
    folders, nets = [], []
    for total in (128, 256):
        args = tiny(script, tmp_path / str(total), **dict(flags, total_timesteps=total))
        folders.append(script.train(args)["folder"])
        nets.append(script.read_checkpoint(folders[-1])["net"])
    found = measured(folders[1])
    assert [row["eps"] for row in found] == pytest.approx([1e-3, 5e-4, 0, 0])
    assert [row["learning_rate"] for row in found] == pytest.approx([2.5e-4, 1.25e-4, 0, 0])
    assert equal(nets[0], nets[1])
    assert [found[-1][k] for k in ("residual", "cosine", "norm_ratio", "kl_moved")] == [0, 0, 0, 0]


def test_rows_mean_over_the_updates_that_measured(tmp_path):
    """Of four updates in a row the third is measured: what it found is not divided by four."""
    flags = dict(REAL, total_timesteps=512, log_every=256, measure_every=3, cg_iterations=3)
    first, second = measured(script.train(tiny(script, tmp_path, **flags))["folder"])
    assert first["cg_iterations"] == 3 and second["cg_iterations"] == 3
    assert first["kl_measured"] == pytest.approx(first["kl_quadratic"], rel=0.5)
    args = tiny(script, tmp_path / "x", **dict(flags, learning_rate=0.0, value_learning_rate=0.0))
    still = measured(script.train(args)["folder"])[0]
    assert still["residual"] == pytest.approx(1, abs=1e-6) and still["kl_moved"] < 1e-12
    assert still["policy_loss"] * 0.01**2 == pytest.approx(still["q_loss"], rel=1e-3)


def test_measuring_does_not_disturb(tmp_path):
    folders = [script.train(tiny(script, tmp_path / str(k), **flags))["folder"]
               for k in (0, 2) for flags in [dict(REAL, measure_every=k)]]
    nets = [script.read_checkpoint(folder)["net"] for folder in folders]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    same = "policy_loss", "value_loss", "kl_moved", "residual", "entropy", "explained_variance"
    assert [[row[k] for k in same] for row in rows(folders[0])] == [
        [row[k] for k in same] for row in rows(folders[1])]


def test_time_limits_bootstrap_and_lost_lives_do_not(tmp_path, monkeypatch):
    td_errors, step, seen, finals, nets = script.td_errors, script.Atari.step, [], [], []

    def watched(r, KL, terminated, truncated, V, V_final, *rest):
        seen.append((terminated.clone(), truncated.clone(), V_final.clone()))
        return td_errors(r, KL, terminated, truncated, V, V_final, *rest)

    def stepped(self, actions):
        s, reward, terminated, truncated, final_s = step(self, actions)
        for i in np.flatnonzero(truncated):
            with torch.no_grad():
                finals.append(float(nets[-1].V(torch.from_numpy(final_s[i:i + 1].copy()))))
        return s, reward, terminated, truncated, final_s

    def made(*args):
        nets.append(network(*args))
        return nets[-1]

    network = script.PolicyAndValue
    monkeypatch.setattr(script, "PolicyAndValue", made)
    monkeypatch.setattr(script, "td_errors", watched)
    monkeypatch.setattr(script.Atari, "step", stepped)
    script.train(tiny(script, tmp_path, env_id="ALE/Pong-v5", max_episode_frames=120))
    _, cut, V = (torch.stack(x) for x in zip(*seen))
    assert cut.sum() > 4 and torch.equal(V != 0, cut > 0)
    torch.testing.assert_close(V[cut > 0], torch.tensor(finals))


@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_an_update_that_is_not_finite_changes_nothing_and_ends_the_run(tmp_path, solver,
                                                                       monkeypatch):
    q_step, calls, nets = script.q_step, [], []

    def spoilt(*args):
        calls.append(1)
        return q_step(*args) * (math.nan if len(calls) > 2 else 1.0)

    count = script.Run.count

    def watched(self, *rest):
        nets.append(script.flat(self.parts["net"].parameters()))
        count(self, *rest)

    monkeypatch.setattr(script, "q_step", spoilt)
    monkeypatch.setattr(script.Run, "count", watched)
    args = tiny(script, tmp_path, **dict(REAL, log_every=1000, total_timesteps=320, solver=solver),
                value="shared")
    with pytest.raises(FloatingPointError, match=r"not finite.*\(policy_loss nan"):
        script.train(args)
    assert len(nets) == 5 and not torch.equal(nets[0], nets[1])
    assert torch.equal(nets[1], nets[2]) and torch.equal(nets[1], nets[4])


@pytest.mark.parametrize("flags", [dict(solver="cg", value="head"), dict(target_kl=1e-4),
                                   dict(value="shared", regularizer="kl")], ids=str)
def test_other_arms_resume_bit_for_bit(tmp_path, flags, monkeypatch):
    flags = dict(REAL, num_envs=2, checkpoint_every=64, **flags)
    whole = script.train(tiny(script, tmp_path / "whole", **flags))["folder"]
    broken = train_until(script, monkeypatch, tiny(script, tmp_path / "broken", **flags), 96)
    script.train(resumed(script, broken))
    a, b = (script.read_checkpoint(folder) for folder in (whole, broken))
    assert all(equal(a[name], b[name]) for name in ("net", "optimizer", "optimizer_V", "sums"))
    assert rows(whole) == rows(broken)
