"""Functions of the paper blocks at extreme numbers: finite, and right to rounding.

Random cases that are the same in every run: one action, ties, Q and rewards of 1e6, tau from 1e-4
to 10, gamma 0 and 1, in float32 and float64.
"""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import a2c_naive
import a2c_proper
import natural_pg_damped as npg
import pgql_equiv
import soft_dqn
from util import rows, trained

examples = settings(max_examples=60, derandomize=True, database=None, deadline=None)
each = pytest.mark.parametrize

class Case(SimpleNamespace):
    """Sizes, tau, gamma, the convention, and random numbers of a size and a type."""
    def normal(self, *shape, scale=None):
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (x * (self.scale if scale is None else scale)).to(self.dtype)

    def mask(self, *shape):
        """0 or 1; never, sometimes or always 1."""
        x = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (x < self.ends).to(self.dtype)

    def actions(self, *shape):
        return torch.randint(self.A, shape, generator=self.generator)

    def rewards(self, *shape):
        signs = self.normal(*shape, scale=1).sign()
        return torch.full_like(signs, self.scale) if self.constant else signs * self.scale

    def rollout(self):
        """a, r, done (T, N), and V_n (N,)."""
        a, r = self.actions(self.T, self.N), self.rewards(self.T, self.N)
        return a, r, self.mask(self.T, self.N), self.normal(self.N)

    def network(self):
        """log pi (T, N, A) and V (T, N) with the leaves that they depend on."""
        logits, V = self.normal(self.T, self.N, self.A), self.normal(self.T, self.N)
        logits, V = logits.requires_grad_(), V.requires_grad_()
        return logits.log_softmax(-1), V, (logits, V)

    def near(self, x, y, *sizes):
        """Whether x and y agree to rounding of numbers of the given sizes and of their own."""
        size = max(float(torch.as_tensor(s).detach().abs().max()) for s in (x, y, *sizes))
        return bool((x - y).abs().max() <= 64 * torch.finfo(self.dtype).eps * size)

    def like(self, dtype):
        """The same case once more, in another type."""
        again = Case(**vars(self) | dict(dtype=dtype, generator=torch.Generator()))
        again.generator.manual_seed(self.seed)
        return again

@st.composite
def cases(draw):
    A = draw(st.sampled_from([1, 2, 3, 18]))
    kl = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    tau = draw(st.sampled_from([1e-4, 1e-2, 1.0, 10.0]) | st.floats(-4, 1).map(lambda x: 10**x))
    case = Case(A=A, T=draw(st.integers(1, 6)), N=draw(st.integers(1, 3)), dtype=dtype, tau=tau,
                gamma=draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
                scale=draw(st.sampled_from([0.0, 1e-6, 1.0, 30.0, 1e6])),
                ends=draw(st.sampled_from([0.0, 0.3, 1.0])), constant=draw(st.booleans()),
                seed=draw(st.integers(0, 2**32 - 1)), kl=kl)
    case.log_pi_bar = torch.full((A,), -math.log(A) if kl else 0.0, dtype=dtype)
    return case.like(dtype)

def finite(*tensors):
    return all(bool(x.isfinite().all()) for x in tensors)

# --- soft_dqn and the Q of pgql_equiv ---
@examples
@given(cases())
def test_the_soft_maximum_has_its_bounds_and_its_policy_has_its_Q(case):
    """max Q <= V_Q <= max Q + tau log A with pi_bar = 1, and tau log A lower with the uniform.

    pi sums to one, is the gradient of V_Q, and its KL is finite; ties do not matter.
    """
    Q = case.normal(4, case.A).requires_grad_()
    V, log_pi = (f(Q, case.log_pi_bar, case.tau) for f in (soft_dqn.soft_value, soft_dqn.boltzmann))
    top, width = Q.max(-1).values, case.tau * math.log(case.A)
    low, high = (top - width, top) if case.kl else (top, top + width)
    slack = 8 * torch.finfo(case.dtype).eps * (top.abs() + width)
    assert finite(V) and (V >= low - slack).all() and (V <= high + slack).all()
    assert torch.equal(soft_dqn.soft_value(Q, case.log_pi_bar, 0), top)
    assert finite(log_pi) and (log_pi <= 0).all()
    assert case.near(log_pi.exp().sum(-1), torch.ones_like(V))
    back = V.unsqueeze(-1) + case.tau * (log_pi - case.log_pi_bar)
    assert case.near(back, Q, width)
    other = pgql_equiv.policy_and_value(Q, case.log_pi_bar, case.tau)
    assert torch.equal(other[0], log_pi) and case.near(other[1], V)
    slack = 64 * torch.finfo(case.dtype).eps * (1 + (top.unsqueeze(-1) - Q).abs() / case.tau)
    for value in (V, other[1]):
        gradient, = torch.autograd.grad(value.sum(), Q, retain_graph=True)
        assert ((gradient - log_pi.exp()).abs() <= slack).all()
    KL = soft_dqn.kl_divergence(log_pi, case.log_pi_bar)
    assert finite(KL, *torch.autograd.grad(log_pi.square().sum() + KL.sum(), Q))

@examples
@given(cases())
def test_targets_and_loss_of_soft_dqn_are_finite(case):
    """Nothing behind an end counts, and Huber's gradient is the square's, clipped."""
    r, done, Q = case.rewards(case.T, 4), case.mask(case.T, 4), case.normal(case.T, 4, case.A)
    rest = case.log_pi_bar, case.tau, case.gamma
    y, gone = soft_dqn.targets(r, done, Q, *rest), done.cumsum(0) - done > 0  # behind an end
    assert finite(y)
    r, Q = torch.where(gone, 1e6, r), torch.where(gone.unsqueeze(-1), -1e6, Q)
    assert torch.equal(soft_dqn.targets(r, done, Q, *rest), y)
    assert torch.equal(soft_dqn.targets(r, torch.ones_like(done), Q, *rest), r[0])
    Q, a, y = case.normal(8, case.A).requires_grad_(), case.actions(8), case.normal(8)
    chosen = torch.nn.functional.one_hot(a, case.A).bool()
    error = Q.detach()[chosen] - y
    for kind, slope in (("square", error), ("huber", error.clamp(-1, 1))):
        L = soft_dqn.loss(Q, a, y, kind)
        gradient, = torch.autograd.grad(L, Q)
        assert finite(L, gradient) and L >= 0 and L.dtype == case.dtype
        assert (gradient[~chosen] == 0).all() and case.near(gradient[chosen], slope / 8, 1e-30)

@examples
@given(cases())
def test_float32_agrees_with_float64(case):
    """To 64 roundings of the largest number that goes in: V_Q, tau log pi, KL, targets, returns."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x = case.like(torch.float32)  # the same numbers, rounded once
        Q, r = (y.to(dtype) for y in (x.normal(x.T, x.N, x.A), x.rewards(x.T, x.N)))
        done, V_n = (y.to(dtype) for y in (x.mask(x.T, x.N), x.normal(x.N)))
        bar = torch.full((x.A,), float(x.log_pi_bar[0])).to(dtype)
        fixed = bar, x.tau
        log_pi = soft_dqn.boltzmann(Q, *fixed)
        results.append((
            soft_dqn.soft_value(Q, *fixed), x.tau * log_pi, x.tau * log_pi.exp(),
            soft_dqn.targets(r, done, Q, *fixed, x.gamma) / (x.T + 1),
            a2c_proper.n_step_returns(r, done, V_n, x.gamma) / (x.T + 1)))
    size = case.scale * 5 + case.tau * (1 + math.log(case.A))
    for wide, narrow in zip(*results):
        assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
        # pi is as exact as Q / tau, and where that is large, pi is 0 or 1
        assert (wide - narrow).abs().max() <= 64 * torch.finfo(torch.float32).eps * size

# --- the policy gradient scripts ---
@each("script", [a2c_naive, a2c_proper], ids=lambda s: s.__name__)
@examples
@given(cases())
def test_a2c_losses_and_gradients_are_finite(script, case):
    """With one action there is nothing to learn for the policy. The entropy has its bounds."""
    log_pi, V, leaves = case.network()
    L, terms = script.losses(log_pi, V, *case.rollout(), case.log_pi_bar, case.tau, case.gamma, 0.5)
    gradients = torch.autograd.grad(L, leaves)
    assert finite(L, *terms.values(), *gradients) and L.dtype == case.dtype
    assert case.near(L, terms["policy_loss"] + 0.5 * terms["value_loss"])
    assert -1e-5 <= terms["entropy"] <= math.log(case.A) + 1e-5 and terms["value_loss"] >= 0
    assert case.A > 1 or (gradients[0] == 0).all()

@each("theory", [False, True])
@examples
@given(cases())
def test_both_rules_of_pgql_are_finite(theory, case):
    c = 1 / case.tau if theory else 0.5
    log_pi, V, leaves = case.network()
    x = pgql_equiv.samples(log_pi, V, *case.rollout(), case.log_pi_bar, case.tau, case.gamma)
    for loss in (pgql_equiv.pg_loss, pgql_equiv.ql_loss, pgql_equiv.gap_loss):
        L = loss(x, case.tau, c)
        gradients = torch.autograd.grad(L.sum(), leaves, retain_graph=True)
        assert finite(L, *gradients) and L.shape == V.shape and L.dtype == case.dtype
        assert case.A > 1 or (gradients[0] == 0).all()
    compared = pgql_equiv.compare_gradients(x, case.tau, c, leaves)
    assert finite(pgql_equiv.q_error(x, case.tau), *compared.values())

# --- natural_pg_damped ---
@examples
@given(cases(), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_damped_losses_are_finite(case, eps):
    log_pi, V, (logits, _) = case.network()
    a, Delta = case.actions(case.T, case.N), case.normal(case.T, case.N)
    log_pi_old = case.normal(case.T, case.N, case.A).log_softmax(-1)
    KL = npg.kl_divergence(log_pi_old, case.log_pi_bar)
    delta = npg.td_errors(Delta, KL, case.mask(case.T, case.N), V[[*range(case.T), 0]], case.tau, 1)
    new, ratio, old, old_ratio = (npg.at(x, a) for y in (log_pi, log_pi_old)
                                  for x in (y, y - case.log_pi_bar))
    A_t = npg.q_step(Delta, old_ratio, KL, case.tau)
    L = npg.regression_loss(new, npg.log_pi_target(old, A_t, eps, case.tau))
    LQ = npg.damped_q_loss(V, ratio, V, old_ratio, A_t, eps, case.tau)
    gradients = torch.autograd.grad((L + LQ).sum(), logits)
    assert finite(delta, A_t, L, LQ, *gradients) and (L >= 0).all() and (LQ >= 0).all()

@examples
@given(cases())
def test_the_natural_gradient_is_finite_and_uphill(case):
    """With any damping, in both types."""
    P, B = 5, 6
    features, theta = case.normal(B, P, scale=1), case.normal(case.A * P, scale=1)
    J = npg.jacobian(lambda theta: (features @ theta.view(P, case.A)).log_softmax(-1), theta,
                     case.actions(B))
    A_t = case.normal(B)
    g = npg.policy_gradient(J, A_t)
    for damping in (0.0, 0.1, 1e6):
        x, residual = npg.natural_gradient(J, A_t, damping, 10)
        assert finite(g, x, residual)
        assert x @ g >= 0 and ((x @ g > 0) == (g @ g > 0) or case.scale == 1e-6)
        assert case.A > 1 or (x == 0).all()

@examples
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.sampled_from([1e-6, 1e-2, 1.0, 100.0]),
       st.sampled_from([1e-6, 1.0, 1e6]), st.sampled_from([torch.float32, torch.float64]))
def test_conjugate_gradients_solve_and_never_leave_the_ground(seed, P, damping, scale, dtype):
    """Each iteration lowers x^T F x / 2 - g^T x; P of them, and some for rounding, solve it."""
    random = torch.Generator().manual_seed(seed)
    half, g = (torch.randn(n, P, generator=random, dtype=torch.float64) for n in (3, 1))
    M, g = half.T @ half + damping * torch.eye(P, dtype=torch.float64), scale * g[0]
    M, g = M.to(dtype), g.to(dtype)
    found = [npg.conjugate_gradient(lambda v: M @ v, g, n) for n in range(P + 1)]
    xs = [x.double() for x, _ in found]
    lows = torch.stack([0.5 * x @ M.double() @ x - g.double() @ x for x in xs])
    assert all(finite(*both) for both in found) and lows[0] == 0
    slack = 1e3 * torch.finfo(dtype).eps * lows[-1].abs() / min(damping, 1)
    assert (lows[1:] <= lows[:-1] + slack).all()
    x, residual = npg.conjugate_gradient(lambda v: M @ v, g, 20 * P)
    assert finite(x, residual)
    if dtype == torch.float64:
        assert residual < 1e-9 and (M @ x - g).norm() <= 1e-6 * g.norm()
        double = npg.conjugate_gradient(lambda v: M @ v, 2 * g, 20 * P)[0]
        assert torch.allclose(double, 2 * x)

@examples
@given(st.floats(1e-9, 10), st.floats(1e-4, 10), st.sampled_from([0.0, 1e-40, 1e-12, 1.0, 1e12]),
       st.sampled_from([torch.float32, torch.float64]))
def test_eps_for_kl_gives_that_kl_or_is_one(target, tau, xFx, dtype):
    xFx = torch.tensor(xFx, dtype=dtype)
    eps = npg.eps_for_kl(target, tau, xFx)
    kl = npg.quadratic_kl(eps, tau, xFx)
    assert finite(eps, kl) and 0 < eps <= 1 and kl <= target * (1 + 1e-5)
    assert eps == 1 or kl == pytest.approx(target, rel=1e-5)

# --- whole runs ---
ARMS = {"soft_dqn": [dict(exploration="boltzmann", n_step=3, learning_starts=20),
                     dict(backup="soft-kl", loss="square", learning_starts=20)],
        "pgql_equiv": [dict(parameterization="q", vf_coef="theory", compare_every=1),
                       dict(update="pg", regularizer="kl", compare_every=1)],
        "natural_pg_damped": [dict(solver="cg", measure_every=1),
                              dict(target_kl=0.1, regularizer="kl", measure_every=1)]}

@each("extreme", [0, 1], ids=["tau 1e-4, gamma 0", "tau 10, gamma 1"])
def test_extreme_flags_train_with_finite_numbers(four, extreme, tmp_path, quick):
    """Over two saves: they refuse parameters after an update that was not finite."""
    flags = [dict(tau=1e-4, gamma=0.0), dict(tau=10.0, gamma=1.0)][extreme]
    flags |= ARMS.get(four.__name__, [{}, dict(regularizer="kl")])[extreme]
    logged = rows(trained(four, tmp_path, total_timesteps=60, log_every=30, save_every=30, **flags))
    assert len(logged) == 2
    for row in logged:
        for name, value in row.items():
            assert name == "score" or math.isfinite(float(value)), (name, value)
