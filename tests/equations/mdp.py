"""Section 3.1-3.5: values, Bellman operators and soft Q-learning's targets, against exact sums.

Operators are small dense matrices; what they are held to are sums over every path. Games end: after
an ending there is neither reward nor KL nor value.
"""
import torch

import natural_pg_damped
import pgql_equiv
import soft_dqn
from equations.base import equation, generator, size
from exact import MDP

TAU, GAMMA, LAMBDA = 0.3, 0.9, 0.7
STEPS = 1, 2, 3  # n

class Problem(MDP):
    """A random MDP, and a policy pi, Q and V that have nothing to do with one another."""
    def __init__(self, seed):
        super().__init__(seed)
        assert 0 < self.ends.sum() < self.ends.numel()
        g = generator(seed + 50)
        self.pi = torch.randn(self.S, self.A, generator=g).softmax(-1)
        self.Q, self.V = torch.randn(self.S, self.A, generator=g), torch.randn(self.S, generator=g)
        self.pi_bar = self.log_pi_bar.exp()
        self.go = (1 - self.ends)[..., None] * self.p  # (S, A, S), to s' in the same game
        self.pi_B, self.V_Q = self.greedy(self.Q), self.soft_value(self.Q)

    def KL(self, pi):
        return (pi * (pi / self.pi_bar).log()).sum(-1)

    def objective(self, pi, Q):
        """The braces of Eq. 27, (S,)."""
        return (pi * Q).sum(-1) - TAU * self.KL(pi)

    def greedy(self, Q):
        """Eq. 28."""
        weights = self.pi_bar * (Q / TAU).exp()
        return weights / weights.sum(-1, keepdim=True)

    def soft_value(self, Q):
        """Eq. 29."""
        return TAU * (self.pi_bar * (Q / TAU).exp()).sum(-1).log()

    def T_V(self, pi, V):
        """Eq. 32."""
        return (pi * (self.r + GAMMA * self.go @ V)).sum(-1) - TAU * self.KL(pi)

    def T_Q(self, pi, Q):
        """Eq. 33."""
        return self.r + GAMMA * self.go @ ((pi * Q).sum(-1) - TAU * self.KL(pi))

    def step(self, pi):
        """The probabilities of s' in the same game given s, (S, S)."""
        return (pi[..., None] * self.go).sum(1)

    def pair_step(self, pi):
        """The same from (s, a) to (s', a'), (S A, S A)."""
        return (self.go[..., None] * pi).reshape(self.S * self.A, -1)

    def V_pi(self):
        """The fixed point of Eq. 32."""
        x = (self.pi * self.r).sum(-1) - TAU * self.KL(self.pi)
        return torch.linalg.solve(torch.eye(self.S) - GAMMA * self.step(self.pi), x)

    def Q_pi(self, pi):
        """The fixed point of Eq. 33."""
        x, M = self.r - GAMMA * TAU * self.go @ self.KL(pi), self.pair_step(pi)
        return torch.linalg.solve(torch.eye(len(M)) - GAMMA * M, x.flatten()).view_as(x)

    def series(self, first, pi, x, rate):
        """sum_t rate^t E[x(s_t)], where s_0 has the probabilities first (..., S)."""
        total = 0.0
        for t in range(400):
            total = total + rate**t * first @ x
            first = first @ self.step(pi)
        return total

class Paths:
    """Every path s_0, a_0 .. s_n, a_n, its actions after a_0 from pi; (n+1, P), (n, P) or (P,)."""
    def __init__(self, m, pi, n):
        grid = torch.cartesian_prod(*map(torch.arange, (m.S, m.A) * (n + 1))).T
        self.m, self.n, self.s, self.a = m, n, grid[0::2], grid[1::2]
        self.here, self.after = self.s[:-1], self.s[1:]
        self.r, self.ends = m.r[self.here, self.a[:-1]], m.ends[self.here, self.a[:-1]]
        steps = m.p[self.here, self.a[:-1], self.after] * pi[self.after, self.a[1:]]
        self.probability = steps.prod(0)  # given s_0 and a_0
        self.live = torch.cat([torch.ones(1, grid.shape[1]), (1 - self.ends).cumprod(0)])

    def mean(self, x):
        """E[x | s_0, a_0], (P,) -> (S, A)."""
        return (self.probability * x).view(self.m.S, self.m.A, -1).sum(-1)

    def discounted(self, x, final):
        """sum_{t<n} gamma^t x_t + gamma^n final."""
        rate = GAMMA ** torch.arange(self.n + 1.0)[:, None]
        return (rate * self.live * torch.cat([x, final[None]])).sum(0)

    def q_targets(self, Q):
        """y_0 by soft_dqn.py."""
        return soft_dqn.targets(self.r, self.ends, Q[self.after], self.m.log_pi_bar[self.after],
                                TAU, GAMMA)

    def td_errors(self, KL, V):
        """delta_t by natural_pg_damped.py, with the KL of each state and V."""
        return natural_pg_damped.td_errors(self.r, KL[self.here], self.ends, V[self.s], TAU, GAMMA)

    def advantage(self, KL, V):
        """sum_{t<n} gamma^t delta_t by natural_pg_damped.py."""
        delta = self.td_errors(KL, V)
        return natural_pg_damped.advantages(delta, self.ends, GAMMA, self.n)[0]

def power(T, pi, x, n):
    for _ in range(n):
        x = T(pi, x)
    return x

def maximizer(m):
    """The argmax of Eq. 27 by mirror ascent, of which each step halves the error of log pi."""
    pi = m.pi
    for _ in range(70):
        pi = pi.detach().requires_grad_()
        slope, = torch.autograd.grad(m.objective(pi, m.Q).sum(), pi)
        pi = (pi.log() + slope / (2 * TAU)).softmax(-1)
    return pi.detach()

# --- 3.1 values ---
@equation(24)
def state_value(seed):
    """The sum over time, by the distribution of s_t, against the fixed point of T_pi."""
    m = Problem(seed)
    x = (m.pi * m.r).sum(-1) - TAU * m.KL(m.pi)
    return m.V_pi() - m.series(torch.eye(m.S), m.pi, x, GAMMA)

@equation(25)
def action_value(seed):
    """The sum over time, with no KL at t = 0, against the fixed point of T_pi for Q."""
    m = Problem(seed)
    x = (m.pi * m.r).sum(-1) - TAU * m.KL(m.pi)
    return m.Q_pi(m.pi) - (m.r + GAMMA * m.series(m.go, m.pi, x, GAMMA))

@equation(26)
def value_of_action_values(seed):
    """Between the solutions of two systems of equations, one in states and one in pairs."""
    m = Problem(seed)
    return m.V_pi() - ((m.pi * m.Q_pi(m.pi)).sum(-1) - TAU * m.KL(m.pi))

# --- 3.2 Boltzmann policy ---
@equation(27)
def boltzmann_is_best(seed):
    """The gradient of the braces is zero at Eq. 28, and random policies do worse in every state."""
    m = Problem(seed)
    logits = m.pi_B.log().requires_grad_()
    best = m.objective(logits.softmax(-1), m.Q)
    others = torch.randn(1000, m.S, m.A, generator=generator(seed)).softmax(-1)
    assert (m.objective(others, m.Q) < best).all()
    return torch.autograd.grad(best.sum(), logits)[0]

@equation(28)
def boltzmann_policy(seed):
    """The closed form against the policy that an ascent on the braces of Eq. 27 ends in."""
    m = Problem(seed)
    weights = m.pi_bar * (m.Q / TAU).exp()
    return maximizer(m) - weights / weights.sum(-1, keepdim=True)

@equation(29, "soft_dqn.soft_value")
def soft_maximum(seed):
    """The script's against the formula, and against the maximum of Eq. 27 found by an ascent."""
    m = Problem(seed)
    V = soft_dqn.soft_value(m.Q, m.log_pi_bar, TAU)
    formula = TAU * (m.pi_bar * (m.Q / TAU).exp()).sum(-1).log()
    return [V - formula, V - m.objective(maximizer(m), m.Q)]

@equation(30, "soft_dqn.boltzmann", "pgql_equiv.policy_and_value")
def boltzmann_by_advantage(seed):
    """The policies of two scripts against the exponential of the advantage Q - V_Q."""
    m = Problem(seed)
    pi = m.pi_bar * ((m.Q - m.V_Q[:, None]) / TAU).exp()
    log_pi = soft_dqn.boltzmann(m.Q, m.log_pi_bar, TAU)
    return [log_pi.exp() - pi,
            pgql_equiv.policy_and_value(m.Q, m.log_pi_bar, TAU)[0].exp() - pi]

@equation(31)
def soft_maximum_as_expectation(seed):
    """The log-sum-exp against an expectation; so Q - V_Q has mean tau KL, not 0."""
    m = Problem(seed)
    assert size((m.pi_B * (m.Q - m.V_Q[:, None])).sum(-1)) > 1e-3
    return m.V_Q - ((m.pi_B * m.Q).sum(-1) - TAU * m.KL(m.pi_B))

# --- 3.3 fixed-policy backups ---
@equation(32)
def backup_of_state_values(seed):
    """For any V against the mean over paths of one step; the sum of Eq. 24 is the fixed point."""
    m = Problem(seed)
    paths, KL = Paths(m, m.pi, 1), m.KL(m.pi)
    s, s_next = paths.s
    average = paths.mean(paths.r[0] - TAU * KL[s] + GAMMA * paths.live[1] * m.V[s_next])
    V = m.series(torch.eye(m.S), m.pi, (m.pi * m.r).sum(-1) - TAU * KL, GAMMA)
    return [m.T_V(m.pi, m.V) - (m.pi * average).sum(-1), m.T_V(m.pi, V) - V]

@equation(33)
def backup_of_action_values(seed):
    """For any Q against the mean over paths of one step; the sum of Eq. 25 is the fixed point."""
    m = Problem(seed)
    paths, KL = Paths(m, m.pi, 1), m.KL(m.pi)
    (_, s_next), (_, a_next) = paths.s, paths.a
    average = paths.mean(
        paths.r[0] + GAMMA * paths.live[1] * (m.Q[s_next, a_next] - TAU * KL[s_next]))
    Q = m.r + GAMMA * m.series(m.go, m.pi, (m.pi * m.r).sum(-1) - TAU * KL, GAMMA)
    return [m.T_Q(m.pi, m.Q) - average, m.T_Q(m.pi, Q) - Q]

@equation(34)
def lookahead_of_state_values(seed):
    """n applications of T_pi to any V against the sum over paths of n steps."""
    m, residuals = Problem(seed), []
    for n in STEPS:
        paths = Paths(m, m.pi, n)
        total = paths.discounted(paths.r - TAU * m.KL(m.pi)[paths.here], m.V[paths.s[n]])
        residuals.append(power(m.T_V, m.pi, m.V, n) - (m.pi * paths.mean(total)).sum(-1))
    return residuals

def lookahead_of_q(m, pi, n):
    """Both sides of Eq. 35 and 40."""
    paths, KL = Paths(m, pi, n), m.KL(pi)
    final = m.Q[paths.s[n], paths.a[n]] - TAU * KL[paths.s[n]]
    total = paths.discounted(paths.r - TAU * KL[paths.here], final)
    return power(m.T_Q, pi, m.Q, n) - TAU * KL[:, None], paths.mean(total)

@equation(35)
def lookahead_of_action_values(seed):
    """n applications of T_pi to any Q, less the first KL, against the sum over paths."""
    m = Problem(seed)
    sides = [lookahead_of_q(m, m.pi, n) for n in STEPS]
    return [left - right for left, right in sides]

@equation(36, "natural_pg_damped.td_errors")
def bellman_errors(seed):
    """Their mean over paths is T_pi V - V, for any V; so it is zero at V_pi."""
    m = Problem(seed)
    paths, residuals = Paths(m, m.pi, 1), []
    for V, change in ((m.V, m.T_V(m.pi, m.V) - m.V), (m.V_pi(), 0.0)):
        delta = paths.td_errors(m.KL(m.pi), V)[0]
        residuals.append((m.pi * paths.mean(delta)).sum(-1) - change)
    return residuals

@equation(37, "natural_pg_damped.td_errors", "natural_pg_damped.advantages", margin=0.1)
def lookahead_by_bellman_errors(seed):
    """Printed with gamma^n V(s_n) in place of V(s): the sum of errors has only the former."""
    m, residuals, printed = Problem(seed), [], []
    for n in STEPS:
        paths, TnV = Paths(m, m.pi, n), power(m.T_V, m.pi, m.V, n)
        Delta = paths.advantage(m.KL(m.pi), m.V)
        final = GAMMA**n * paths.live[n] * m.V[paths.s[n]]
        residuals.append(TnV - m.V - (m.pi * paths.mean(Delta)).sum(-1))
        printed.append(size(TnV - (m.pi * paths.mean(Delta + final)).sum(-1)))
    return residuals, min(printed)

# --- 3.4 Boltzmann backups ---
@equation(38, "soft_dqn.targets", margin=0.1)
def boltzmann_backup(seed):
    """Printed with Q(s, a) for Q(s', a') and without gamma on the KL; Eq. 39 needs both.

    The script's target, averaged over s', against the expectation over a'. Either mistake by itself
    is excluded as well.
    """
    m = Problem(seed)
    paths, KL = Paths(m, m.pi, 1), m.KL(m.pi_B)
    TQ = paths.mean(paths.q_targets(m.Q))
    later, stays = m.go @ (m.pi_B * m.Q).sum(-1), (1 - m.ends) * m.Q
    printed, bracket, action = (TQ - (m.r + x) for x in (
        GAMMA * stays - TAU * m.go @ KL, GAMMA * (stays - TAU * m.go @ KL),
        GAMMA * later - TAU * m.go @ KL))
    assert min(size(bracket), size(action)) > 1e-3
    return TQ - (m.r + GAMMA * (later - TAU * m.go @ KL)), printed

@equation(39, "soft_dqn.targets")
def soft_backup(seed):
    """The script's target, averaged over s', against the log-sum-exp, and against Eq. 33 at pi_B.

    It does not depend on the policy that acts.
    """
    m = Problem(seed)
    TQ = m.r + GAMMA * m.go @ (TAU * (m.pi_bar * (m.Q / TAU).exp()).sum(-1).log())
    averages = [paths.mean(paths.q_targets(m.Q)) for paths in (Paths(m, m.pi, 1),
                                                               Paths(m, m.pi_B, 1))]
    return [TQ - averages[0], TQ - averages[1], TQ - m.T_Q(m.pi_B, m.Q)]

@equation(40)
def lookahead_of_boltzmann(seed):
    """Eq. 35 at pi_B of Q, which stays that of Q: with the pi_B of each backup it is another."""
    m = Problem(seed)
    sides = [lookahead_of_q(m, m.pi_B, n) for n in STEPS]
    TQ = m.T_Q(m.pi_B, m.Q)
    assert size(m.T_Q(m.greedy(TQ), TQ) - m.T_Q(m.pi_B, TQ)) > 1e-3
    return [left - right for left, right in sides]

@equation(41, "soft_dqn.targets")
def lookahead_ends_in_soft_value(seed):
    """n applications of T against sums over paths of pi_B, by hand and by the script.

    From n = 2 on the script's are biased where another policy chooses the actions after the first.
    """
    m, residuals = Problem(seed), []
    KL = m.KL(m.pi_B)
    for n in STEPS:
        paths, other, TnQ = Paths(m, m.pi_B, n), Paths(m, m.pi, n), power(m.T_Q, m.pi_B, m.Q, n)
        total = paths.discounted(paths.r - TAU * KL[paths.here], m.V_Q[paths.s[n]])
        residuals += [TnQ - TAU * KL[:, None] - paths.mean(total),
                      TnQ - paths.mean(paths.q_targets(m.Q))]
        assert n == 1 or size(TnQ - other.mean(other.q_targets(m.Q))) > 1e-3
    return residuals

def lambda_backup(m, terms=150):
    """Eq. 42, the terms written out."""
    total, TkQ = 0.0, m.Q
    for k in range(terms):
        TkQ = m.T_Q(m.pi_B, TkQ)
        total = total + (1 - LAMBDA) * LAMBDA**k * TkQ
    return total

@equation(42)
def td_lambda(seed):
    """The sum over k against a closed form, from TQ = Q_pi + M (Q - Q_pi) with pi = pi_B.

    (lambda T)^k must mean lambda^k T^k: T has a constant term, so x -> lambda T x applied again
    and again does not vanish, and the sum of such terms would diverge.
    """
    m = Problem(seed)
    M, Q_pi, x = GAMMA * m.pair_step(m.pi_B), m.Q_pi(m.pi_B), m.Q
    inverse = torch.linalg.inv(torch.eye(len(M)) - LAMBDA * M)
    closed = Q_pi + ((1 - LAMBDA) * M @ inverse @ (m.Q - Q_pi).flatten()).view_as(Q_pi)
    for _ in range(200):
        x = LAMBDA * m.T_Q(m.pi_B, x)
    assert size(x) > 1e-2
    return lambda_backup(m) - closed

@equation(43, "natural_pg_damped.td_errors", margin=0.1)
def td_lambda_by_errors(seed):
    """Printed with Q(s, a) where V_Q(s) + tau KL(s) belongs; they agree only on average over pi_B.

    The first delta takes off V_Q(s) + tau KL(s), so that must be put back. To add tau KL(s) to the
    printed form is not enough; Q(s, a) is right with errors r + gamma V_Q(s') - Q(s, a) instead.
    """
    m = Problem(seed)
    paths, KL, TQ = Paths(m, m.pi_B, 1), m.KL(m.pi_B), lambda_backup(m)

    def summed(delta):
        later = m.series(m.go, m.pi_B, (m.pi_B * delta).sum(-1), GAMMA * LAMBDA)
        return delta + GAMMA * LAMBDA * later

    errors = summed(paths.mean(paths.td_errors(KL, m.V_Q)[0]))
    excess = m.Q - (m.V_Q + TAU * KL)[:, None]  # of the printed form
    assert size((m.pi_B * excess).sum(-1)) < 1e-12
    errors_of_q = summed(m.r + GAMMA * m.go @ m.V_Q - m.Q)
    assert size(TQ - (m.Q + TAU * KL[:, None] + errors)) > 0.1
    return ([TQ - ((m.V_Q + TAU * KL)[:, None] + errors), TQ - (m.Q + errors_of_q)],
            TQ - (m.Q + errors))

# --- 3.5 soft Q-learning ---
@equation(44, "soft_dqn.loss", "soft_dqn.targets")
def squared_error(seed):
    """The script's loss over all transitions: its value, and its gradient, zero where Q is TQ.

    y is held fixed; the gradient is another where it is not.
    """
    m = Problem(seed)
    paths = Paths(m, m.pi, 1)
    (s, s_next), a = paths.s, paths.a[0]
    mu = torch.rand(m.S, m.A, generator=generator(seed)).flatten().softmax(0).view(m.S, m.A)
    y, weight = paths.q_targets(m.Q), mu[s, a] * paths.probability
    Q = m.Q.clone().requires_grad_()
    L, free = (sum(w * soft_dqn.loss(Q[s][i:i + 1], a[i:i + 1], x[i:i + 1], "square")
                   for i, w in enumerate(weight)) for x in (y, paths.q_targets(Q)))
    gradient, gradient_free = (torch.autograd.grad(x, Q)[0] for x in (L, free))
    assert size(gradient - gradient_free) > 1e-3
    by_hand = m.r[s, a] + GAMMA * paths.live[1] * m.V_Q[s_next]
    value = (weight * 0.5 * (m.Q[s, a] - by_hand) ** 2).sum()
    return [L.detach() - value, gradient - mu * (m.Q - m.T_Q(m.pi_B, m.Q))]

@equation(45, "soft_dqn.targets")
def one_step_target(seed):
    """The script's for every transition, V_Q by Eq. 31; after an ending nothing follows."""
    m = Problem(seed)
    paths = Paths(m, m.pi, 1)
    V_Q = m.objective(m.pi_B, m.Q)
    return paths.q_targets(m.Q) - (paths.r[0] + GAMMA * (1 - paths.ends[0]) * V_Q[paths.s[1]])

def forward_target(m, paths, late=0):
    """Eq. 46 from left to right, with gamma^{late + n}."""
    KL, V_Q = m.KL(m.pi_B), m.objective(m.pi_B, m.Q)
    total = paths.discounted(paths.r - TAU * KL[paths.here], GAMMA**late * V_Q[paths.s[paths.n]])
    return TAU * KL[paths.s[0]] + total

@equation(46, "soft_dqn.targets", "pgql_equiv.samples", "pgql_equiv.q_error", margin=0.04)
def n_step_target(seed):
    """Printed gamma^{t+n}, right at t = 0 only, tried at t = 5: y_t discounts from t on.

    y_t of two scripts, of the second as Q - (Q - y_t), for every path, with games that end on it.
    """
    m, residuals, printed = Problem(seed), [], []
    for n in STEPS:
        paths = Paths(m, m.pi, n)
        y, a = paths.q_targets(m.Q), paths.a[:-1]
        x = pgql_equiv.samples(m.pi_B.log()[paths.here], m.V_Q[paths.here], a, paths.r, paths.ends,
                               m.V_Q[paths.s[n]], m.log_pi_bar[paths.here], TAU, GAMMA)
        other = m.Q[paths.s[0], a[0]] - pgql_equiv.q_error(x, TAU)[0]
        residuals += [y - forward_target(m, paths), other - forward_target(m, paths)]
        printed.append(size(y - forward_target(m, paths, late=5)))
    return residuals, min(printed)

@equation(47, "natural_pg_damped.td_errors", "natural_pg_damped.advantages", "soft_dqn.targets")
def n_step_target_by_errors(seed):
    """For every path, by the errors of one script, the targets of another and the sum forward."""
    m, residuals = Problem(seed), []
    KL = m.KL(m.pi_B)
    for n in STEPS:
        paths = Paths(m, m.pi, n)
        y = (TAU * KL + m.V_Q)[paths.s[0]] + paths.advantage(KL, m.V_Q)
        residuals += [y - paths.q_targets(m.Q), y - forward_target(m, paths)]
    return residuals
