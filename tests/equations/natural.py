"""Section 5: damped Q regression and the natural gradient, on one batch of states and actions."""
import math

import torch

import natural_pg_damped as script
from equations.base import equation, generator
from exact import MDP

TAU, EPS, LAMBDA = 0.3, 0.05, 0.1  # damping eps; the natural gradient step is eps / tau
NAME = "natural_pg_damped."

class Policy:
    """A policy with a hidden layer on one-hot states, as a function of one row of parameters."""
    def __init__(self, mdp, seed, hidden=4):
        self.shapes = (mdp.S, hidden), (hidden, mdp.A)
        self.theta = torch.randn(sum(map(math.prod, self.shapes)), generator=generator(seed))

    def log_pi(self, theta):
        """(P,) -> log pi (S, A)."""
        trunk, head = (part.view(shape) for part, shape in
                       zip(theta.split([math.prod(x) for x in self.shapes]), self.shapes))
        return (trunk.tanh() @ head).log_softmax(-1)

class Problem:
    """A batch of states and actions, drawn at random, and everything that section 5 fixes."""
    def __init__(self, seed, B=40, S=4, A=3):
        g = generator(seed + 50)
        self.mdp, self.A, self.B = MDP(seed, S, A), A, B
        self.policy = Policy(self.mdp, seed + 100)
        self.theta = self.policy.theta
        self.s, self.a = torch.randint(S, (B,), generator=g), torch.randint(A, (B,), generator=g)
        self.Delta, self.V = torch.randn(2, B, generator=g)
        self.elsewhere = self.theta + torch.randn(len(self.theta), generator=g)
        self.log_pi_bar = self.mdp.log_pi_bar[self.s]
        self.log_pi_old = self.log_pi(self.theta)  # (B, A)
        self.KL = script.kl_divergence(self.log_pi_old, self.log_pi_bar)
        self.log_ratio_old = self.log_ratio(self.theta)
        self.adv = script.q_step(self.Delta, self.log_ratio_old, self.KL, TAU)
        self.target = script.log_pi_target(self.taken(self.theta), self.adv, EPS, TAU)
        self.J = script.jacobian(self.log_pi, self.theta, self.a)
        self.dense = torch.func.jacrev(self.log_pi)(self.theta)  # (B, A, P)
        self.Psi = self.dense[torch.arange(B), self.a]  # (B, P)

    def log_pi(self, theta):
        return self.policy.log_pi(theta)[self.s]

    def taken(self, theta):
        return script.at(self.log_pi(theta), self.a)

    def log_ratio(self, theta):
        return script.at(self.log_pi(theta) - self.log_pi_bar, self.a)

    def q_loss(self, theta, V=None, eps=EPS):
        return script.damped_q_loss(self.V if V is None else V, self.log_ratio(theta), self.V,
                                    self.log_ratio_old, self.adv, eps, TAU)

    def x(self, damping=LAMBDA, A=None):
        A = self.adv if A is None else A
        return script.natural_gradient(self.J, A, damping, 100)[0]

def gauss_newton(residual, theta, damping):
    """-(J^T J / B + damping)^-1 J^T r / B of a vector of residuals, dense."""
    r, J = residual(theta), torch.func.jacrev(residual)(theta)
    F = J.T @ J / len(r) + damping * torch.eye(len(theta))
    return -torch.linalg.solve(F, J.T @ r / len(r))

def loss_residual(loss):
    """The residual whose half square is a loss of the script, up to its sign, near theta."""
    return lambda theta: (2 * loss(theta)).sqrt()

@equation(66, NAME + "natural_gradient", NAME + "policy_gradient", NAME + "sampled_fisher",
          margin=0.5)
def least_squares(seed):
    """Conjugate gradients against the minimum of |Psi w - eps A|^2 + B lambda |w|^2 by a QR solve.

    This w holds eps already; the step eps w of Eq. 67 as printed would be 1 - eps too short.
    """
    p = Problem(seed)
    step = EPS / TAU
    rows = torch.cat([p.Psi, math.sqrt(p.B * LAMBDA) * torch.eye(len(p.theta))])
    right = torch.cat([step * p.adv, torch.zeros(len(p.theta))])
    w = torch.linalg.lstsq(rows, right).solution
    found = step * p.x()
    return found - w, (step * w - found).norm() / found.norm()

@equation(67, NAME + "jacobian", bound=1e-6)
def first_order(seed):
    """log pi moves by psi^T (theta - theta_old) to first order; what is left falls with its square.

    The residual is the change of (what is left) / h^2 when h is halved, from h = 1e-4 on, times h.
    """
    p = Problem(seed)
    d, h = p.elsewhere - p.theta, 1e-4
    left = [(p.log_pi(p.theta + k * d) - p.log_pi_old - p.J.times(k * d)) / k**2
            for k in (h, h / 2)]
    return h * (left[0] - left[1])

@equation(68, NAME + "regression_loss", NAME + "natural_gradient")
def regression(seed):
    """One Gauss-Newton step on the script's loss with the advantage as target is that of Eq. 66."""
    p = Problem(seed)
    target = script.log_pi_target(p.taken(p.theta), p.Delta, EPS, TAU)
    sign = torch.sign(p.taken(p.theta) - target)
    residual = loss_residual(lambda theta: script.regression_loss(p.taken(theta), target))
    step = gauss_newton(lambda theta: sign * residual(theta), p.theta, LAMBDA)
    return step - EPS / TAU * p.x(A=p.Delta)

def expected_gradient(p, adv):
    """E of the script's policy gradient, states alike, a ~ pi; adv (S, A)."""
    total, pi = 0.0, p.policy.log_pi(p.theta).exp()
    for s in range(len(pi)):
        for a in range(p.A):
            J = script.jacobian(lambda theta, s=s: p.policy.log_pi(theta)[[s]], p.theta,
                                torch.tensor([a]))
            total = total + pi[s, a] / len(pi) * script.policy_gradient(J, adv[s, a, None])
    return total

def objective_gradient(p, Delta):
    """Eq. 69 by automatic differentiation: mean over states of E[log pi Delta] - tau KL."""
    pi = p.policy.log_pi(p.theta).exp()

    def objective(theta):
        log_pi = p.policy.log_pi(theta)
        KL = (log_pi.exp() * (log_pi - p.mdp.log_pi_bar)).sum(-1)
        return ((pi * log_pi * Delta).sum(-1) - TAU * KL).mean()

    return torch.func.grad(objective)(p.theta)

def tables(p, seed):
    """Delta (S, A), and log pi - log pi_bar (S, A) and KL (S, 1) at theta_old."""
    log_pi = p.policy.log_pi(p.theta)
    log_ratio = log_pi - p.mdp.log_pi_bar
    Delta = torch.randn(log_pi.shape, generator=generator(seed + 7))
    return Delta, log_ratio, (log_pi.exp() * log_ratio).sum(-1, keepdim=True)

@equation(69, NAME + "policy_gradient")
def entropy_regularized_gradient(seed):
    """psi Delta by the script's function, minus tau grad KL, against autograd of the whole."""
    p = Problem(seed)
    Delta, *_ = tables(p, seed)
    KL = torch.func.grad(lambda theta: script.kl_divergence(
        p.policy.log_pi(theta), p.mdp.log_pi_bar).mean())(p.theta)
    return expected_gradient(p, Delta) - TAU * KL - objective_gradient(p, Delta)

@equation(70, NAME + "policy_gradient", NAME + "q_step")
def gradient_with_one_advantage(seed):
    """On average over a ~ pi, psi A is Eq. 69; on a batch, of one action a state, it is not."""
    p = Problem(seed)
    Delta, log_ratio, KL = tables(p, seed)
    adv = script.q_step(Delta, log_ratio, KL, TAU)

    def on_batch(theta):
        return (p.taken(theta) * p.Delta
                - TAU * script.kl_divergence(p.log_pi(theta), p.log_pi_bar)).mean()

    batch = script.policy_gradient(p.J, p.adv)
    assert (batch - torch.func.grad(on_batch)(p.theta)).abs().max() > 1e-3
    return expected_gradient(p, adv) - objective_gradient(p, Delta)

@equation(71, NAME + "regression_loss", NAME + "log_pi_target", NAME + "q_step", margin=0.01)
def regression_with_regularizer(seed):
    """A Gauss-Newton step on the script's loss is the natural gradient step of size eps / tau.

    Printed with log pi_theta inside the target, its Jacobian is 1 + eps times too large.
    """
    p = Problem(seed)
    sign = torch.sign(p.taken(p.theta) - p.target)
    residual = loss_residual(lambda theta: script.regression_loss(p.taken(theta), p.target))
    step = gauss_newton(lambda theta: sign * residual(theta), p.theta, LAMBDA)

    def printed(theta):
        A = p.Delta - TAU * (p.log_ratio(theta) - p.KL)
        return p.taken(theta) - p.taken(p.theta).detach() - EPS / TAU * A

    x = EPS / TAU * p.x()
    as_printed = gauss_newton(printed, p.theta, LAMBDA)
    return step - x, (as_printed - x).norm() / x.norm()

@equation(72, NAME + "damped_q_loss")
def soft_q_learning(seed):
    """eps = 1 against 1/2 (V_theta + tau log ratio - (V_old + tau KL_old + Delta))^2, V free."""
    p = Problem(seed)
    V = p.V + torch.randn(p.B, generator=generator(seed))
    y = p.V + TAU * p.KL + p.Delta
    square = 0.5 * (V + TAU * p.log_ratio(p.elsewhere) - y).square()
    return p.q_loss(p.elsewhere, V, eps=1.0) - square

@equation(73, NAME + "damped_q_loss")
def soft_q_learning_with_v_fixed(seed):
    """With V_theta = V_old it is 1/2 (tau log ratio - (Delta + tau KL_old))^2; not with V free."""
    p = Problem(seed)
    square = 0.5 * (TAU * p.log_ratio(p.elsewhere) - (p.Delta + TAU * p.KL)).square()
    assert (p.q_loss(p.elsewhere, p.V + 1, eps=1.0) - square).abs().max() > 0.1
    return p.q_loss(p.elsewhere, eps=1.0) - square

@equation(74, NAME + "damped_q_loss", NAME + "q_step")
def damped_target(seed):
    """The Q of which the script's loss is zero is Q_old + eps (Q_hat - Q_old); solved by Newton."""
    p = Problem(seed)
    Q_old, Q_hat = p.V + TAU * p.log_ratio_old, p.V + TAU * p.KL + p.Delta

    def slope(Q):  # of the loss with respect to Q = V + tau log ratio, at log ratio = 0
        return torch.func.grad(lambda V: script.damped_q_loss(
            V, torch.zeros(p.B), p.V, p.log_ratio_old, p.adv, EPS, TAU).sum())(Q)

    minimum = -slope(torch.zeros(p.B))  # the loss is 1/2 Q^2 - Q minimum + const
    assert (slope(torch.ones(p.B)) - slope(torch.zeros(p.B)) - 1).abs().max() < 1e-12
    return minimum - ((1 - EPS) * Q_old + EPS * Q_hat)

@equation(75, NAME + "q_step")
def step_in_q(seed):
    """Q_hat - Q_old with V_old in both, from Eq. 47 and 57; with V_theta in the first it is not."""
    p = Problem(seed)
    Q_hat, Q_old = p.V + TAU * p.KL + p.Delta, p.V + TAU * p.log_ratio_old
    return p.adv - (Q_hat - Q_old)

@equation(76, NAME + "q_step")
def step_in_q_is_the_advantage(seed):
    """Delta + tau (KL_old - log ratio_old), of which the mean under pi_old is that of Delta."""
    p = Problem(seed)
    Delta, log_ratio, KL = tables(p, seed)
    adv, pi = script.q_step(Delta, log_ratio, KL, TAU), p.policy.log_pi(p.theta).exp()
    return [p.adv - (p.Delta + TAU * (p.KL - p.log_ratio_old)), (pi * (adv - Delta)).sum(-1)]

@equation(77, NAME + "damped_q_loss")
def error_of_the_damped_target(seed):
    """Q_theta - Q_hat^eps = Q_theta - Q_old - eps (Q_hat - Q_old), as the root of the loss."""
    p = Problem(seed)
    Q, Q_old = (p.V + TAU * p.log_ratio(theta) for theta in (p.elsewhere, p.theta))
    Q_hat = p.V + TAU * p.KL + p.Delta
    return (2 * p.q_loss(p.elsewhere)).sqrt() - (Q - Q_old - EPS * (Q_hat - Q_old)).abs()

@equation(78, NAME + "damped_q_loss", NAME + "regression_loss", NAME + "log_pi_target", margin=1e-3)
def damped_q_loss_is_the_regression(seed):
    """tau^2 times the loss of Eq. 71 with eps / tau, for every theta; printed without the taus."""
    p = Problem(seed)
    log_pi = p.taken(p.elsewhere)
    line_2 = 0.5 * (log_pi - p.taken(p.theta) - EPS * p.adv).square()
    line_1 = 0.5 * (p.log_ratio(p.elsewhere) - p.log_ratio_old - EPS * p.adv).square()
    exact = TAU**2 * script.regression_loss(log_pi, p.target)
    q_loss = p.q_loss(p.elsewhere)
    assert (q_loss - TAU**2 * line_2).abs().max() > 1e-3, "eps without 1/tau, though with tau^2"
    return q_loss - exact, min((q_loss - x).abs().max() for x in (line_1, line_2))
