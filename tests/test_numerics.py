"""Functions of the paper blocks at extreme numbers: finite, and true to what the paper proves.

Random cases that are the same in every run: one action, ties, Q and rewards of 1e6, tau from 1e-4
to 10, gamma 0 and 1, in float32 and float64.
"""
import importlib
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
from conftest import SCRIPTS
from util import rows, trained

examples = settings(max_examples=60, derandomize=True, database=None, deadline=None)
WITH_KL = [importlib.import_module(name) for name in SCRIPTS]
WITH_RETURNS = [a2c_naive, a2c_proper, pgql_equiv]
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

    def near(self, x, y, *sizes, factor=64):
        """Whether x and y agree to rounding of numbers of the given sizes and of their own."""
        size = max(float(torch.as_tensor(s).detach().abs().max()) for s in (x, y, *sizes))
        return bool((x - y).abs().max() <= factor * torch.finfo(self.dtype).eps * size)

    def like(self, dtype):
        """The same case once more, in another type."""
        again = Case(**vars(self) | dict(dtype=dtype, generator=torch.Generator()))
        again.generator.manual_seed(self.seed)
        return again

@st.composite
def cases(draw, A=None):
    A = A or draw(st.sampled_from([1, 2, 3, 18]))
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

# --- V_Q and the Boltzmann policy ---
@examples
@given(cases())
def test_the_soft_maximum_lies_between_its_bounds(case):
    """max Q <= V_Q <= max Q + tau log A with pi_bar = 1, and tau log A lower with the uniform."""
    Q = case.normal(4, case.A)
    V, top = soft_dqn.soft_value(Q, case.log_pi_bar, case.tau), Q.max(-1).values
    width = case.tau * math.log(case.A)
    low, high = (top - width, top) if case.kl else (top, top + width)
    slack = 8 * torch.finfo(case.dtype).eps * (top.abs() + width)
    assert finite(V) and (V >= low - slack).all() and (V <= high + slack).all()
    assert torch.equal(soft_dqn.soft_value(Q, case.log_pi_bar, 0), top)
    mean = Q.mean(-1) + (0 if case.kl else width)  # Jensen
    assert (V >= mean - 8 * torch.finfo(case.dtype).eps * (Q.abs().max() + width)).all()

@examples
@given(cases(), st.sampled_from([-1e6, -1.0, 0.5, 1e6]))
def test_the_soft_maximum_moves_and_scales_with_Q(case, k):
    Q = case.normal(4, case.A)
    V, pi = (f(Q, case.log_pi_bar, case.tau) for f in (soft_dqn.soft_value, soft_dqn.boltzmann))
    moved = soft_dqn.soft_value(Q + k, case.log_pi_bar, case.tau)
    assert case.near(moved, V + k, Q, k, case.tau * math.log(case.A))
    s = abs(k)
    scaled = soft_dqn.soft_value(s * Q, case.log_pi_bar, s * case.tau)
    assert case.near(scaled, s * V, s * Q, s * case.tau * math.log(case.A))
    assert case.near(soft_dqn.boltzmann(s * Q, case.log_pi_bar, s * case.tau), pi, Q / case.tau)

@examples
@given(cases(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_soft_maximum_rises_with_Q_and_with_tau(case, step):
    """No entry of Q can rise and V_Q fall; where pi_bar = 1, V_Q also rises with tau."""
    Q = case.normal(4, case.A)
    V, up = soft_dqn.soft_value(Q, case.log_pi_bar, case.tau), Q.clone()
    up[:, 0] += step
    slack = 8 * torch.finfo(case.dtype).eps * (Q.abs().max() + step + case.tau * 3)
    higher = soft_dqn.soft_value(up, case.log_pi_bar, case.tau)
    assert (higher >= V - slack).all() and (higher <= V + step + slack).all()
    warmer = soft_dqn.soft_value(Q, 0 * case.log_pi_bar, 2 * case.tau)
    assert (warmer >= soft_dqn.soft_value(Q, 0 * case.log_pi_bar, case.tau) - slack).all()

@examples
@given(cases())
def test_the_boltzmann_policy_is_a_policy_and_has_its_Q(case):
    """sum pi = 1, Q = V_Q + tau log(pi / pi_bar), and pi is the gradient of V_Q."""
    Q = case.normal(4, case.A).requires_grad_()
    log_pi = soft_dqn.boltzmann(Q, case.log_pi_bar, case.tau)
    V = soft_dqn.soft_value(Q, case.log_pi_bar, case.tau)
    assert finite(log_pi) and (log_pi <= 0).all()
    assert case.near(log_pi.exp().sum(-1), torch.ones_like(V))
    back = V.unsqueeze(-1) + case.tau * (log_pi - case.log_pi_bar)
    assert case.near(back, Q, case.tau * math.log(case.A))
    gradient, = torch.autograd.grad(V.sum(), Q, retain_graph=True)
    slack = 64 * torch.finfo(case.dtype).eps * (1 + (Q.max(-1, True)[0] - Q).abs() / case.tau)
    assert ((gradient - log_pi.exp()).abs() <= slack).all()
    assert finite(gradient, *torch.autograd.grad(log_pi.square().sum(), Q))

@each("script", WITH_KL, ids=SCRIPTS)
@examples
@given(cases())
def test_divergence_and_entropy_have_their_bounds(script, case):
    log_pi = case.normal(4, case.A).log_softmax(-1)
    slack = 64 * torch.finfo(case.dtype).eps * (1 + math.log(case.A))
    uniform = script.kl_divergence(log_pi, torch.full_like(log_pi, -math.log(case.A)))
    entropy = -script.kl_divergence(log_pi, 0.0)
    other = case.normal(4, case.A, scale=3.0).log_softmax(-1)
    assert finite(uniform, entropy) and (script.kl_divergence(log_pi, other) >= -slack).all()
    for x in (uniform, entropy):
        assert (x >= -slack).all() and (x <= math.log(case.A) + slack).all()
    assert case.near(uniform + entropy, torch.full_like(uniform, math.log(case.A)), 1)
    assert (script.kl_divergence(log_pi, log_pi) == 0).all()

@examples
@given(cases())
def test_the_q_parameterization_is_the_boltzmann_policy_of_soft_dqn(case):
    Q = case.normal(4, case.A).requires_grad_()
    log_pi, V = pgql_equiv.policy_and_value(Q, case.log_pi_bar, case.tau)
    assert case.near(V, soft_dqn.soft_value(Q, case.log_pi_bar, case.tau))
    assert torch.equal(log_pi, soft_dqn.boltzmann(Q, case.log_pi_bar, case.tau))
    gradient, = torch.autograd.grad(V.sum(), Q)  # here ties do not matter: the top is held fixed
    slack = 64 * torch.finfo(case.dtype).eps * (1 + (Q.max(-1, True)[0] - Q).abs() / case.tau)
    assert ((gradient - log_pi.exp()).abs() <= slack).all()

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

# --- targets of soft_dqn ---
def q_targets(case, n, **changed):
    """targets() of random stored transitions, and what went into it."""
    x = dict(r=case.rewards(n, 4), done=case.mask(n, 4), Q=case.normal(n, 4, case.A),
             log_pi_bar=case.log_pi_bar, tau=case.tau, gamma=case.gamma) | changed
    return soft_dqn.targets(**x), x

@examples
@given(cases())
def test_targets_are_finite_and_end_where_the_game_does(case):
    y, x = q_targets(case, case.T)
    assert finite(y)
    done = x["done"]
    gone = done.cumsum(0) - done > 0  # (n, B) rewards behind an end
    r = torch.where(gone, 1e6, x["r"])
    Q = torch.where(gone.unsqueeze(-1), -1e6, x["Q"])
    assert torch.equal(soft_dqn.targets(**x | dict(r=r, Q=Q)), y)
    over = dict(done=torch.ones_like(done))
    assert torch.equal(soft_dqn.targets(**x | over), x["r"][0])
    assert torch.equal(soft_dqn.targets(**x | dict(gamma=0.0)), x["r"][0])

@examples
@given(cases())
def test_targets_add_up_rewards_and_the_soft_maximum(case):
    """Hard: discounted rewards and max Q. One step: r + gamma V_Q. One action: soft is hard."""
    no = torch.zeros(case.T, 4, dtype=case.dtype)
    y, x = q_targets(case, case.T, done=no, tau=0)
    discounts = case.gamma ** torch.arange(case.T + 1, dtype=case.dtype)
    total = (discounts[:-1, None] * x["r"]).sum(0) + discounts[-1] * x["Q"][-1].max(-1).values
    assert case.near(y, total, case.T * case.scale, x["Q"])
    y, x = q_targets(case, 1)
    V = soft_dqn.soft_value(x["Q"][0], case.log_pi_bar, case.tau)
    assert case.near(y, x["r"][0] + case.gamma * (1 - x["done"][0]) * V, x["r"], V)
    if case.A == 1:
        soft, x = q_targets(case, case.T)
        assert torch.equal(soft, soft_dqn.targets(**x | dict(tau=0)))
    both = [q_targets(case.like(case.dtype), case.T, done=no,
                      log_pi_bar=torch.full_like(case.log_pi_bar, constant))[0]
            for constant in (0.0, -math.log(case.A))]  # differ by tau log A in each later state
    lived = case.tau * math.log(case.A) * discounts[1:].sum()
    assert case.near(both[0] - both[1], lived.expand(4), case.T * (5 * case.scale + lived))

@examples
@given(cases(), st.sampled_from([1e-6, 1.0, 1e6]))
def test_targets_rise_with_rewards_and_scale_with_them(case, k):
    y, x = q_targets(case, case.T)
    slack = 64 * torch.finfo(case.dtype).eps * (case.T * (5 * case.scale + k + 3 * case.tau))
    assert (soft_dqn.targets(**x | dict(r=x["r"] + k)) >= y + k - slack).all()
    scaled = x | dict(r=k * x["r"], Q=k * x["Q"], tau=k * x["tau"])
    size = k * case.T * (5 * case.scale + 3 * case.tau)
    assert case.near(soft_dqn.targets(**scaled), k * y, size)

@each("kind", ["square", "huber"])
@examples
@given(cases())
def test_q_loss_and_its_gradient(kind, case):
    """Not negative, 0 at the target, blind to other actions; Huber's clips the error at 1."""
    Q, a, y = case.normal(8, case.A).requires_grad_(), case.actions(8), case.normal(8)
    L = soft_dqn.loss(Q, a, y, kind)
    gradient, = torch.autograd.grad(L, Q)
    assert finite(L, gradient) and L >= 0 and L.dtype == case.dtype
    chosen = torch.nn.functional.one_hot(a, case.A).bool()
    assert (gradient[~chosen] == 0).all()
    error = Q.detach()[chosen] - y
    bound = error if kind == "square" else error.clamp(-1, 1)
    assert case.near(gradient[chosen], bound / 8, 1e-30)
    at_target = Q.detach().gather(-1, a.unsqueeze(-1)).squeeze(-1)
    assert soft_dqn.loss(Q, a, at_target, kind) == 0
    square = soft_dqn.loss(Q, a, y, "square")
    assert L <= square * (1 + 8 * torch.finfo(case.dtype).eps)

@examples
@given(cases())
def test_actions_are_actions(case):
    """Also at a temperature that leaves one action, and with every Q the same."""
    Q = case.normal(16, case.A)
    noise = torch.empty_like(Q).exponential_(generator=case.generator)
    drawn = [soft_dqn.boltzmann_sample(Q, case.tau, noise), soft_dqn.epsilon_greedy(Q, 0.5, noise)]
    drawn += [script.sample(Q.log_softmax(-1), noise) for script in (*WITH_RETURNS, npg)]
    for a in drawn:
        assert a.dtype == torch.int64 and a.shape == (16,) and 0 <= a.min() <= a.max() < case.A
    assert torch.equal(soft_dqn.epsilon_greedy(Q, 0.0, noise), Q.argmax(-1))

# --- returns ---
@each("script", WITH_RETURNS, ids=lambda s: s.__name__)
@examples
@given(cases())
def test_returns_at_the_ends_of_their_range(script, case):
    """gamma = 0 or a lost game: the reward. gamma = 1, no end: their sum and V_n."""
    _, r, done, V_n = case.rollout()
    one, no = torch.ones_like(r), torch.zeros_like(r)
    assert finite(script.n_step_returns(r, done, V_n, case.gamma))
    assert torch.equal(script.n_step_returns(r, done, V_n, 0.0), r)
    assert torch.equal(script.n_step_returns(r, one, V_n, case.gamma), r)
    total = script.n_step_returns(r, no, V_n, 1.0)
    assert case.near(total, r.flip(0).cumsum(0).flip(0) + V_n, case.T * case.scale, V_n)

@each("script", WITH_RETURNS, ids=lambda s: s.__name__)
@examples
@given(cases(), st.integers(0, 5))
def test_returns_look_ahead_only_and_not_past_an_end(script, case, t):
    _, r, done, V_n = case.rollout()
    t, more = min(t, case.T - 1), r.clone()
    more[t] += 1e6
    changed = (script.n_step_returns(more, done, V_n, case.gamma)
               - script.n_step_returns(r, done, V_n, case.gamma))
    slack = 64 * torch.finfo(case.dtype).eps * case.T * (5 * case.scale + 1e6)
    assert (changed[t + 1:] == 0).all()
    assert ((changed[t] - 1e6).abs() <= slack).all()
    for before in range(t):
        reach = case.gamma ** (t - before) * (1 - done[before:t]).prod(0)
        assert ((changed[before] - 1e6 * reach).abs() <= slack).all()

@examples
@given(cases())
def test_one_step_errors_add_up_to_the_n_step_returns(case):
    """advantages(n >= T) of natural_pg_damped and n_step_returns of a2c_proper: V + Delta."""
    _, r, done, V_n = case.rollout()
    V, KL = torch.cat([case.normal(case.T, case.N), V_n[None]]), case.normal(case.T, case.N).abs()
    delta = npg.td_errors(r, KL, done, V, case.tau, case.gamma)
    Delta = npg.advantages(delta, done, case.gamma, case.T + 3)
    R = a2c_proper.n_step_returns(r - case.tau * KL, done, V_n, case.gamma)
    size = case.T * 10 * case.scale * (1 + case.tau)
    assert finite(delta, Delta) and case.near(V[:-1] + Delta, R, size)
    assert torch.equal(npg.advantages(delta, done, case.gamma, 1), delta)
    assert torch.equal(npg.advantages(delta, done, 0.0, case.T), delta)

# --- losses of the policy gradient scripts ---
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
    if case.A == 1:
        assert (gradients[0] == 0).all()

@examples
@given(cases())
def test_uniform_reference_costs_a_constant_reward(case):
    """The KL form is the entropy form with rewards less tau log A, value and gradients."""
    log_pi, V, leaves = case.network()
    a, r, done, V_n = case.rollout()
    cost = case.tau * math.log(case.A)
    results = []
    for bar, paid in ((-math.log(case.A), r), (0.0, r - cost)):
        L, terms = a2c_proper.losses(log_pi, V, a, paid, done, V_n, bar, case.tau, case.gamma, 0.5)
        results.append([terms["V_hat"], *torch.autograd.grad(L, leaves, retain_graph=True)])
    for kl, entropy in zip(*results):
        assert case.near(kl, entropy, case.T * (5 * case.scale + cost), factor=256)

@each("theory", [False, True])
@examples
@given(cases())
def test_both_rules_of_pgql_are_finite_and_differ_by_the_gap(theory, case):
    c = 1 / case.tau if theory else 0.5
    log_pi, V, leaves = case.network()
    x = pgql_equiv.samples(log_pi, V, *case.rollout(), case.log_pi_bar, case.tau, case.gamma)
    gradients = []
    for loss in (pgql_equiv.pg_loss, pgql_equiv.ql_loss, pgql_equiv.gap_loss):
        each_loss = loss(x, case.tau, c)
        assert finite(each_loss) and each_loss.shape == V.shape and each_loss.dtype == case.dtype
        gradients.append(torch.autograd.grad(each_loss.sum(), leaves, retain_graph=True))
    assert finite(pgql_equiv.q_error(x, case.tau), *sum(gradients, ()))
    size = case.T * (5 * case.scale + case.tau * (1 + case.scale)) * (1 + c) + case.tau
    for pg, ql, gap in zip(*gradients):
        assert case.near(ql, pg + gap, pg, gap, size)
    if case.A == 1:
        assert all((g[0] == 0).all() for g in gradients)
    compared = pgql_equiv.compare_gradients(x, case.tau, c, leaves)
    assert finite(*compared.values())

@examples
@given(cases())
def test_the_gap_vanishes_on_average_over_actions(case):
    """In each state, over a_t ~ pi: the sum over all actions, weighted by pi."""
    logits = case.normal(1, case.N, case.A, scale=min(case.scale, 30.0)).requires_grad_()
    V = case.normal(1, case.N).requires_grad_()
    log_pi = logits.log_softmax(-1).expand(case.A, -1, -1)  # row a is the sample with action a
    a = torch.arange(case.A)[:, None].expand(-1, case.N)
    one = torch.ones(case.A, case.N, dtype=case.dtype)
    x = pgql_equiv.samples(log_pi, V.expand(case.A, -1), a, case.rewards(case.A, case.N), one, V[0],
                           case.log_pi_bar, case.tau, case.gamma)
    pi = log_pi.detach()[0].exp().T  # (A, N)
    gap = (pi * pgql_equiv.gap_loss(x, case.tau, 0.5)).sum()
    size = case.tau * 200
    for g in torch.autograd.grad(gap, (logits, V)):
        assert case.near(g, torch.zeros_like(g), size)

# --- natural_pg_damped ---
@examples
@given(cases(), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_damped_losses_are_one(case, eps):
    """tau^2 regression_loss = damped_q_loss where V is held fixed; eps = 0 leaves log pi."""
    log_pi, V, (logits, _) = case.network()
    a, Delta = case.actions(case.T, case.N), case.normal(case.T, case.N)
    log_pi_old = case.normal(case.T, case.N, case.A).log_softmax(-1)
    KL, V = npg.kl_divergence(log_pi_old, case.log_pi_bar), V.detach()
    new, ratio, old, old_ratio = (npg.at(x, a) for y in (log_pi, log_pi_old)
                                  for x in (y, y - case.log_pi_bar))
    A_t = npg.q_step(Delta, old_ratio, KL, case.tau)
    target = npg.log_pi_target(old, A_t, eps, case.tau)
    L = npg.regression_loss(new, target)
    LQ = npg.damped_q_loss(V, ratio, V, old_ratio, A_t, eps, case.tau)
    assert finite(A_t, target, L, LQ, *torch.autograd.grad(L.sum(), logits, retain_graph=True))
    assert (L >= 0).all() and (LQ >= 0).all()
    assert torch.equal(npg.log_pi_target(old, A_t, 0.0, case.tau), old)
    # Q - Q_eps and tau (log pi - target) are the same number, rounded apart
    error, error_Q = case.tau * (2 * L).sqrt(), (2 * LQ).sqrt()
    assert case.near(error, error_Q, V, A_t, case.tau * new, case.tau * old, case.tau * 4)

@examples
@given(cases())
def test_the_fisher_matrices_are_symmetric_and_positive(case):
    """And natural_gradient is finite and uphill, with any damping, in both types."""
    P, B = 5, 6
    features, theta = case.normal(B, P, scale=1), case.normal(case.A * P, scale=1)
    a, A_t = case.actions(B), case.normal(B)
    v, w = case.normal(2, case.A * P, scale=1)

    def log_pi_of(theta):
        return (features @ theta.view(P, case.A)).log_softmax(-1)

    J, log_pi = npg.jacobian(log_pi_of, theta, a), log_pi_of(theta)
    Fv, Fw = (npg.sampled_fisher(J, x) for x in (v, w))
    size = B * P * 10
    assert case.near(w @ Fv, v @ Fw, size) and v @ Fv >= -1e-5
    Jv, Jw = J.times(v), J.times(w)
    vFw, wFv = npg.all_action_fisher(log_pi, Jv, Jw), npg.all_action_fisher(log_pi, Jw, Jv)
    assert case.near(vFw, wFv) and npg.all_action_fisher(log_pi, Jv, Jv) >= 0
    for damping in (0.0, 0.1, 1e6):
        g = npg.policy_gradient(J, A_t)
        x, residual = npg.natural_gradient(J, A_t, damping, 10)
        assert finite(g, x, residual)
        assert x @ g >= 0 and ((x @ g > 0) == (g @ g > 0) or case.scale == 1e-6)
        if case.A == 1:
            assert (x == 0).all()

def energy(M, g, x):
    return 0.5 * x @ M @ x - g @ x

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
    lows = torch.stack([energy(M.double(), g.double(), x.double()) for x, _ in found])
    assert all(finite(*both) for both in found) and (lows[0] == 0)
    slack = 1e3 * torch.finfo(dtype).eps * lows[-1].abs() / min(damping, 1)
    assert (lows[1:] <= lows[:-1] + slack).all()
    x, residual = npg.conjugate_gradient(lambda v: M @ v, g, 20 * P)
    assert finite(x, residual)
    if dtype == torch.float64:
        assert residual < 1e-9 and (M @ x - g).norm() <= 1e-6 * g.norm()
        double = npg.conjugate_gradient(lambda v: M @ v, 2 * g, 20 * P)[0]
        assert torch.allclose(double, 2 * x)

@each("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_where_there_is_nothing_to_solve(dtype):
    """No gradient, no curvature or a negative one: x = 0, and no NaN."""
    g = torch.tensor([1.0, -2.0], dtype=dtype)
    for product, right, residual in ((lambda v: v, 0 * g, 0), (lambda v: 0 * v, g, 1),
                                     (lambda v: -v, g, 1)):
        x, left = npg.conjugate_gradient(product, right, 5)
        assert (x == 0).all() and left == residual

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
