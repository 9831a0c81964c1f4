"""The paper's section 5, numerically: natural_pg_damped.py's own functions, float64 and real games.

What equations/natural.py does not have of rows 36, 47, 54 and 66-78; then networks and whole runs.
"""
import csv
import math

import numpy as np
import pytest
import torch
from torch import nn

import natural_pg_damped as script
from equations.natural import EPS, LAMBDA, TAU, Problem, gauss_newton
from util import checkpoint, equal, rows, trained

GAMMA = 0.9

@pytest.fixture(params=range(3))
def problem(request, double):
    return Problem(request.param)

def far(a, b):
    """Relative distance of two vectors."""
    return float((a - b).norm() / b.norm())

@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_are_those_of_equations_36_47_and_54(double, seed, n):
    """Forward sums, one reward at a time, with lost lives, time limits and the rollout's end."""
    g, (T, N) = torch.Generator().manual_seed(seed), (7, 4)
    terminated, truncated = (torch.rand(2, T, N, generator=g) < 0.25).double()
    truncated = truncated * (1 - terminated)
    r, KL, V_final = torch.randn(3, T, N, generator=g)
    V, paid = torch.randn(T + 1, N, generator=g), r + GAMMA * V_final * truncated
    delta = script.td_errors(paid, KL, terminated + truncated, V, TAU, GAMMA)
    Delta = script.advantages(delta, terminated + truncated, GAMMA, n)
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

def test_gradient_of_either_loss_at_theta_old_is_the_policy_gradient(problem):
    p = problem
    g = script.policy_gradient(p.J, p.adv)
    assert (g - p.Psi.T @ p.adv / p.B).abs().max() < 1e-14
    of_q = torch.func.grad(lambda theta: p.q_loss(theta).mean())(p.theta)
    of_log = torch.func.grad(
        lambda theta: script.regression_loss(p.taken(theta), p.target).mean())(p.theta)
    assert (of_q + EPS * TAU * g).abs().max() < 1e-14
    assert (of_log + EPS / TAU * g).abs().max() < 1e-13

def test_fisher_matrices_are_the_dense_ones(problem):
    p, g = problem, torch.Generator().manual_seed(5)
    v, w = torch.randn(2, len(p.theta), generator=g)
    assert (script.sampled_fisher(p.J, v) - p.Psi.T @ (p.Psi @ v) / p.B).abs().max() < 1e-13
    F_all = torch.einsum("ba,bap,baq->pq", p.log_pi_old.exp(), p.dense, p.dense) / p.B
    found = script.all_action_fisher(p.log_pi_old, p.J.times(v), p.J.times(w))
    assert abs(found - v @ F_all @ w) < 1e-13
    mean, pi = 0.0, p.policy.log_pi(p.theta).exp()  # over states, each alike, and a ~ pi
    for s, a in np.ndindex(*pi.shape):
        J = script.jacobian(lambda theta, s=s: p.policy.log_pi(theta)[[s]], p.theta,
                            torch.tensor([a]))
        mean = mean + pi[s, a] / len(pi) * script.sampled_fisher(J, v)
    Jv, Jw = (torch.func.jvp(p.policy.log_pi, (p.theta,), (x,))[1] for x in (v, w))
    all_actions = script.all_action_fisher(p.policy.log_pi(p.theta), Jv, Jw)
    assert abs(mean @ w - all_actions) < 1e-13, "they agree on average over actions"

@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_conjugate_gradients_equal_a_dense_solve(problem, damping):
    p = problem
    g = p.Psi.T @ p.adv / p.B
    F = p.Psi.T @ p.Psi / p.B + damping * torch.eye(len(p.theta))
    dense = torch.linalg.solve(F, g)
    x, residual = script.natural_gradient(p.J, p.adv, damping, 60)
    assert far(x, dense) < 1e-8 and residual < 1e-8
    for k in (1, 3):  # cut off before the end: the residual is the true one
        x, residual = script.natural_gradient(p.J, p.adv, damping, k)
        assert abs(residual - (F @ x - g).norm() / g.norm()) < 1e-10
        assert far(x, dense) > 1e-6

@pytest.mark.parametrize("iterations", [1, 60])
def test_without_gradient_or_curvature_conjugate_gradients_find_zero(iterations):
    zero, one = torch.zeros(3), torch.ones(3)
    for product, g, left in ((lambda v: 2 * v, zero, 0), (lambda v: 0 * v, one, 1),
                             (lambda v: -v, one, 1)):
        x, residual = script.conjugate_gradient(product, g, iterations)
        assert torch.equal(x, zero) and residual == left
    x, residual = script.conjugate_gradient(lambda v: v, torch.full((3,), math.nan), iterations)
    assert x.isnan().all() and residual.isnan(), "which ends the run"

def test_actions_lie_on_the_last_axis():
    log_pi, Jv, Jw = torch.randn(3, 2, 5, 4).unbind()
    log_pi, a = log_pi.log_softmax(-1), torch.randint(4, (2, 5))
    each = [script.all_action_fisher(*x) for x in zip(log_pi, Jv, Jw)]
    assert abs(script.all_action_fisher(log_pi, Jv, Jw) - sum(each) / 2) < 1e-6
    assert all(script.at(log_pi, a)[i] == log_pi[i][a[i]] for i in np.ndindex(2, 5))
    log_pi, noise = torch.tensor([0.2, 0.5, 0.3]).log().expand(2, 5, 3), torch.ones(2, 5, 3)
    noise[1, :, 2] = math.exp(-1)
    assert script.sample(log_pi, noise).tolist() == [[1] * 5, [2] * 5]

def test_a_gauss_newton_step_on_the_side_of_q_has_its_own_damping(problem):
    """Row 78: eps/tau (F_hat + lambda)^-1 g_hat, with lambda tau^2; in log pi it is check 71."""
    p, step = problem, EPS / TAU * problem.x()

    def in_q(theta):  # the residual of damped_q_loss, with its sign
        sign = torch.sign(p.log_ratio(theta) - p.log_ratio_old - EPS / TAU * p.adv).detach()
        return sign * (2 * p.q_loss(theta)).sqrt()

    assert far(gauss_newton(in_q, p.theta, TAU**2 * LAMBDA), step) < 1e-8
    assert far(gauss_newton(in_q, p.theta, LAMBDA), step) > 0.03, "lambda of the other side"

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

# networks and fits

def a_batch(A, B=12, seed=0):
    """obs, a and A_t of a batch at random."""
    g = torch.Generator().manual_seed(seed)
    obs = torch.randint(256, (B, 4, 84, 84), dtype=torch.uint8, generator=g)
    return obs, torch.randint(A, (B,), generator=g), torch.randn(B, generator=g)

@pytest.mark.parametrize("n", [6, 1])
def test_network_initialization_and_outputs(n):
    torch.manual_seed(0)
    net, obs = script.Network(n), torch.randint(256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    layers = [m for m in net.modules() if hasattr(m, "weight")]
    assert [tuple(m.weight.shape) for m in layers] == [
        (32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (n, 512)]
    for m in layers:
        w, gain = m.weight.detach().flatten(1), 1.0 if m is net.head else math.sqrt(2)
        assert torch.allclose(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-4)
        assert not m.bias.any()
    y = net.head(net.trunk(obs.flatten(0, 1).float() / 255)).view(2, 3, n)
    expected = y.log_softmax(-1) if n > 1 else y[..., 0]
    torch.testing.assert_close(net(obs), expected, rtol=0, atol=1e-5)

def test_solve_finds_the_natural_gradient_of_the_network_and_move_adds_it():
    """Against a dense solve in the space of samples: x = Psi^T (Psi Psi^T + B lambda)^-1 A."""
    torch.manual_seed(1)
    pi = script.Network(4).to(memory_format=torch.channels_last)
    (obs, a, A_t), args = a_batch(4), script.Args(damping=0.05, cg_iterations=40)
    x, times, residual, seconds = script.solve(pi, obs, a, A_t, args)
    assert seconds > 0
    Psi = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        y, [*pi.parameters()], retain_graph=True)]) for y in script.at(pi(obs), a)]).double()
    kernel = Psi @ Psi.T + len(a) * args.damping * torch.eye(len(a))
    dense = Psi.T @ torch.linalg.solve(kernel, A_t.double())
    assert far(x.double(), dense) < 1e-3 and residual < 1e-3
    assert far(script.at(times(x), a).double(), Psi @ dense) < 1e-3
    theta = script.flat(pi)
    torch.testing.assert_close(pi.trunk[0].weight.flatten(), theta[:8192])
    script.move(pi, x)
    assert torch.equal(script.flat(pi), theta + x)
    assert equal(script.unflat(pi, theta + x), dict(pi.state_dict()))

def test_fit_is_passes_of_plain_adam_each_in_a_new_order():
    """The fused one on channels-last weights against torch's other one, clipped, a plain loop."""
    torch.manual_seed(2)
    net, other = script.Network(4).to(memory_format=torch.channels_last), script.Network(4)
    other.load_state_dict(net.state_dict())
    data, args = a_batch(4), script.Args(minibatch_size=5, max_grad_norm=0.1)
    loss, plain_loss = (lambda obs, a, target, net=net: script.regression_loss(
        script.at(net(obs), a), target).mean() for net in (net, other))
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-5, fused=True)
    plain = torch.optim.Adam(other.parameters(), lr=1e-3, eps=1e-5)
    before, losses = script.flat(net), []
    torch.manual_seed(3)
    mean = script.fit(loss, adam, data, 2, args)
    torch.manual_seed(3)
    for order in (torch.randperm(12), torch.randperm(12)):
        for i in (order[:5], order[5:10], order[10:]):
            plain.zero_grad()
            losses.append(plain_loss(*(x[i] for x in data)))
            losses[-1].backward()
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            plain.step()
    assert not torch.equal(script.flat(net), before)
    torch.testing.assert_close(script.flat(net), script.flat(other), rtol=0, atol=2e-5)
    torch.testing.assert_close(mean, torch.stack(losses).mean())

def test_an_update_runs_on_the_meta_device():
    """Nothing looks at a value or makes a tensor elsewhere, for which a GPU would have to wait."""
    A, B, args = 4, 8, script.Args(cg_iterations=2)
    pi, V = (script.Network(n).to("meta") for n in (A, 1))
    obs = torch.zeros(B, 4, 84, 84, dtype=torch.uint8, device="meta")
    noise, A_t, i = (torch.zeros(shape, device="meta") for shape in ((B, A), B, 3))
    log_pi_old, i = pi(obs).detach(), i.long()
    a = script.sample(log_pi_old, noise)
    x, times, residual, _ = script.solve(pi, obs, a, A_t, args)
    eps = script.eps_for_kl(1e-3, 0.01, script.all_action_fisher(log_pi_old, times(x), times(x)))
    target = script.log_pi_target(script.at(log_pi_old, a), A_t, eps, 0.01)
    made = [a, x, residual, target, script.mean_kl(log_pi_old, pi(obs))]
    for net, loss in ((pi, lambda: script.regression_loss(script.at(pi(obs[i]), a[i]), target[i])),
                      (V, lambda: 0.5 * (V(obs[i]) - A_t[i]).square())):
        adam = torch.optim.Adam(net.parameters(), eps=1e-5, fused=False)
        made += [script.descend(loss().mean(), adam, 0.5) for _ in range(2)]
        made += [y for p in net.parameters() for y in (p, p.grad, adam.state[p]["exp_avg"])]
    script.move(pi, eps / 0.01 * x)
    assert {y.device.type for y in made} == {"meta"}

# real games

def trained_rows(folder, **flags):
    with open(trained(script, folder, **flags) / "metrics.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]

# In Breakout's black frames, with biases of 0, ReLUs stand exactly in their kinks before training.
REAL = dict(env_id="ALE/Krull-v5", total_timesteps=192, log_every=64, measure_every=1,
            num_envs=4, num_steps=16, n_step=8, minibatch_size=32, schedule_timesteps=10_000,
            eps=1e-4, cg_iterations=10, passes=4, value_passes=2)

@pytest.mark.parametrize("flags", [dict(solver="cg"), dict(solver="regression"),
                                   dict(solver="cg", regularizer="kl")], ids=str)
def test_kl_moved_on_real_games_is_the_predicted(tmp_path, flags):
    """Within 20% of 1/2 d^T F_all d, and of what conjugate gradients predict for their own step."""
    small = dict(REAL, learning_rate=1e-5, value_learning_rate=1e-5)  # Adam's steps have its size
    found = trained_rows(tmp_path, **small, **flags)
    assert len(found) == 3
    for row in found:
        assert row["kl_measured"] == pytest.approx(row["kl_quadratic"], rel=0.2)
        assert row["kl_moved"] == pytest.approx(row["kl_measured"], rel=1e-3)
        assert abs(row["cosine"]) < 1.0001 and abs(row["cosine_fisher"]) < 1.0001
        assert row["cg_seconds"] > 0
        if flags["solver"] == "cg":
            assert row["kl_measured"] == pytest.approx(row["kl_natural"], rel=0.2)
            assert row["cosine"] == pytest.approx(1, abs=1e-3)
            assert row["norm_ratio"] == pytest.approx(1, abs=1e-2)
        else:
            assert found[0]["cosine"] > 0 and found[0]["cosine_fisher"] > 0, "uphill, at the first"

@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_target_kl_is_held_while_step_sizes_decay(tmp_path, solver):
    flags = dict(REAL, target_kl=1e-6, solver=solver, eps=0.5, schedule_timesteps=200,
                 total_timesteps=128, cg_iterations=3)
    for row in trained_rows(tmp_path, **flags):
        assert row["learning_rate"] == pytest.approx(2.5e-4 * (1 - (row["step"] - 64) / 200))
        assert row["kl_natural"] == pytest.approx(1e-6, rel=1e-4)
        assert 0 < row["eps"] < 0.01
        if solver == "cg":
            assert row["kl_measured"] == pytest.approx(row["kl_natural"], rel=0.2)

def test_passes_come_closer_to_the_minimum(tmp_path):
    """More passes leave less of the damped Q loss."""
    left = []
    for passes in (1, 20):
        flags = dict(REAL, passes=passes, learning_rate=1e-3, eps=0.05, measure_every=0)
        row, *_ = trained_rows(tmp_path / str(passes), **flags | dict(total_timesteps=64))
        left.append(row["residual"])
        assert all(math.isnan(row[name]) for name in script.MEASURED)
    assert left[1] < 0.7 * left[0], left

def test_what_train_puts_together(tmp_path, monkeypatch):
    """Rollouts, recomputed from what they hold: observations, rewards, actions, KL, V, targets.

    With time limits, which pay V of the last observation, and a lost life, which does not.
    """
    nets, played, calls = [], [], {}
    send, recv, network = script.Atari.send, script.Atari.recv, script.Network

    def sent(self, actions):
        played.append([actions.clone()])
        send(self, actions)

    def received(self):
        s, r, terminated, truncated, last = recv(self)
        r[1] = -7.0 * (len(played) % 3 == 0)  # or no reward would come so soon
        terminated[2] |= len(played) == 5
        paid = r.sign()
        if last is not None:
            with torch.no_grad():
                paid[truncated] += 0.99 * nets[1](last)
        played[-1] += [s.clone(), paid, terminated | truncated, truncated]
        return s, r, terminated, truncated, last

    def watch(name, function):
        def watched(*args):
            states = [{k: x.clone() for k, x in net.state_dict().items()} for net in nets]
            calls.setdefault(name, []).append((*args, states))
            return function(*args)
        monkeypatch.setattr(script, name, watched)

    for name in ("sample", "td_errors", "q_step", "solve", "mean_kl", "fit"):
        watch(name, getattr(script, name))
    monkeypatch.setattr(script.Atari, "send", sent)
    monkeypatch.setattr(script.Atari, "recv", received)
    monkeypatch.setattr(script, "Network", lambda n: nets.append(network(n)) or nets[-1])
    found = trained_rows(tmp_path, **REAL, regularizer="kl", max_episode_frames=120)
    assert len(found) == 3 and sum(int(step[4].sum()) for step in played) == 4
    noise = torch.cat([call[1] for call in calls["sample"]])
    assert float((noise < 1).double().mean()) == pytest.approx(1 - math.exp(-1), abs=0.05)
    for k, row in enumerate(found):
        actions, s_next, r, done, _ = map(torch.stack, zip(*played[16 * k:16 * k + 16]))
        r_used, KL, done_used, V_old, *_, states = calls["td_errors"][k]
        Delta, log_ratio, KL_used, *_ = calls["q_step"][k]
        _, obs, a, A_t, *_ = calls["solve"][k]
        log_pi_old, (s, V_hat) = calls["mean_kl"][k][0], calls["fit"][2 * k + 1][2]
        for net, state in zip(nets, states):
            net.load_state_dict(state)
        with torch.no_grad():
            log_pi, values = nets[0](obs), nets[1](torch.cat([obs, s_next[-1]])).view(17, 4)
        first = 0 if k else 4  # the first observations are those of reset()
        before = torch.stack([step[1] for step in played])[16 * k - 1 if k else 0:16 * k + 15]
        assert torch.equal(obs[first:], before.flatten(0, 1)) and torch.equal(s, obs)
        A = log_pi.shape[-1]
        assert torch.equal(a, actions.flatten()) and len(set(a.tolist())) > 5
        clocks = log_pi.exp() / noise.view(3, 64, A)[k]  # exponential: the first to ring
        assert torch.equal(a, clocks.argmax(-1))
        assert torch.equal(done_used, done.float()) and torch.equal(KL_used, KL)
        expected_KL = (math.log(A) + (log_pi.exp() * log_pi).sum(-1)).view(16, 4)
        expected_ratio = (script.at(log_pi, a) + math.log(A)).view(16, 4)
        delta = script.td_errors(r, expected_KL, done.float(), values, 0.01, 0.99)
        expected_Delta = script.advantages(delta, done.float(), 0.99, 8)
        expected_V_hat = values[:-1] + expected_Delta
        for used, expected in ((r_used, r), (log_pi_old, log_pi), (V_old, values),
                               (KL, expected_KL), (Delta, expected_Delta),
                               (log_ratio, expected_ratio), (V_hat, expected_V_hat.flatten())):
            torch.testing.assert_close(used, expected, rtol=0, atol=1e-5)
        expected = script.q_step(expected_Delta, expected_ratio, expected_KL, 0.01)
        torch.testing.assert_close(A_t, expected.flatten(), rtol=0, atol=1e-4)
        for name, x in (("V_hat", expected_V_hat), ("V", values[:-1])):
            assert row[name] == pytest.approx(float(x.mean()), rel=1e-4)
        assert row["entropy"] == pytest.approx(math.log(A) - float(expected_KL.mean()), rel=1e-4)
        value_loss = float(0.5 * expected_Delta.square().mean())
        assert 0.5 * value_loss < row["value_loss"] < 1.5 * value_loss

@pytest.mark.parametrize("solver", ["cg", "regression"])
def test_eps_and_step_sizes_decay_to_nothing(tmp_path, solver, monkeypatch):
    """Linearly over the schedule; past it neither fit moves anything."""
    flags = dict(REAL, schedule_timesteps=128, total_timesteps=256, save_every=128, solver=solver,
                 eps=1e-3, measure_every=4, cg_iterations=2)
    states, save = [], script.Run.save

    def saved(self):
        if self.due("save"):
            states.append([script.flat(self.parts[name]) for name in ("pi", "V")])
        return save(self)

    monkeypatch.setattr(script.Run, "save", saved)
    found = trained_rows(tmp_path, **flags)
    assert [row["eps"] for row in found] == pytest.approx([1e-3, 5e-4, 0, 0])
    assert [row["learning_rate"] for row in found] == pytest.approx([2.5e-4, 1.25e-4, 0, 0])
    assert len(states) == 2 and equal(*states)
    assert [found[-1][k] for k in ("residual", "cosine", "norm_ratio", "kl_moved")] == [0, 0, 0, 0]

def test_rows_mean_over_the_updates_that_measured(tmp_path):
    """One update of two is measured: what it found is not divided by two."""
    flags = dict(REAL, total_timesteps=256, log_every=128, measure_every=2, cg_iterations=3)
    for row in trained_rows(tmp_path / "a", **flags, solver="cg"):
        assert row["cosine"] == pytest.approx(1, abs=1e-3)
        assert row["kl_measured"] == pytest.approx(row["kl_quadratic"], rel=0.5)
    flags |= dict(total_timesteps=128, learning_rate=0.0, value_learning_rate=0.0)
    still = trained_rows(tmp_path / "b", **flags)[0]
    assert still["residual"] == pytest.approx(1, abs=1e-6) and still["kl_moved"] < 1e-12
    assert still["policy_loss"] * 0.01**2 == pytest.approx(still["q_loss"], rel=1e-3)

def test_measuring_does_not_disturb(tmp_path):
    folders = [trained(script, tmp_path / str(k), **dict(REAL, measure_every=k, cg_iterations=2))
               for k in (0, 2)]
    a, b = (checkpoint(script, folder) for folder in folders)
    assert equal([a["pi"], a["V"]], [b["pi"], b["V"]])
    same = "policy_loss", "value_loss", "kl_moved", "residual", "entropy"
    assert [[row[k] for k in same] for row in rows(folders[0])] == [
        [row[k] for k in same] for row in rows(folders[1])]

def test_a_tau_of_zero_is_refused():
    with pytest.raises(ValueError, match="--tau 0"):
        script.train(script.Args(tau=0.0))
