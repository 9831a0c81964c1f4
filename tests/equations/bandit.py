"""Section 2, the bandit: E over actions and rewards is a finite sum, pi_B the Boltzmann policy."""
import torch
from torch import distributions
from torch.autograd.functional import jacobian

import pgql_equiv
from equations.base import equation, generator, size

TAU = 0.6

class Bandit:
    """A actions with K rewards each, P parameters. pi and pi_bar are arbitrary."""
    def __init__(self, seed, A=5, K=3, P=4):
        g = generator(seed)
        self.p = torch.randn(A, K, generator=g).softmax(-1)
        self.r = torch.randn(A, K, generator=g)
        self.r_bar = (self.p * self.r).sum(-1)
        self.log_pi, self.log_pi_bar = torch.randn(2, A, generator=g).log_softmax(-1)
        self.pi, self.pi_bar = self.log_pi.exp(), self.log_pi_bar.exp()
        self.x, self.theta = torch.randn(A, P, generator=g), torch.randn(P, generator=g)

    def q(self, theta):
        """q_theta, (P,) -> (A,), not linear in theta."""
        return 2 * (self.x.to(theta.dtype) @ theta).tanh()

    def log_B(self, theta):
        return (self.log_pi_bar + self.q(theta) / TAU).log_softmax(-1)

    def v(self, theta):
        return TAU * (self.log_pi_bar + self.q(theta) / TAU).logsumexp(-1)

    def KL(self, theta):
        """KL[pi_B || pi_bar] at theta."""
        return KL(self.log_B(theta), self.log_pi_bar)

    def grad(self, f):
        """Gradient (P,) of a scalar function of theta, or the gradients (A, P) of a vector."""
        return jacobian(f, self.theta)

    def E(self, pi, f):
        """The mean of f (A, K, ...) over a ~ pi and r."""
        return torch.tensordot((pi[:, None] * self.p).to(f.dtype), f, 2)

    def eta(self, pi, q):
        return (pi * (q - TAU * (pi.log() - self.log_pi_bar))).sum(-1)

    def maximizer(self, q, steps=60):
        """log pi of greatest eta, by mirror ascent: eta and its gradient are all it knows."""
        log_pi = torch.zeros_like(q).log_softmax(-1)
        for _ in range(steps):
            slope = jacobian(lambda pi: self.eta(pi, q), log_pi.exp())
            log_pi = (log_pi + 0.5 / TAU * slope).log_softmax(-1)
        return log_pi

    def loss(self, theta, pi):
        return self.E(pi, 0.5 * (self.q(theta)[:, None] - self.r) ** 2)

def KL(log_pi, log_other):
    """As PyTorch has it."""
    return distributions.kl_divergence(*(distributions.Categorical(logits=x)
                                         for x in (log_pi, log_other)))

def complex_step(f, theta):
    """The gradient of f without autograd, exact to rounding."""
    h = 1e-30
    return torch.stack([f(theta + 1j * h * e).imag / h for e in torch.eye(len(theta))])

def per_draw(x):
    """(A, ...) -> (A, 1, ...), to meet rewards (A, K)."""
    return x.unsqueeze(1)

@equation(1)
def objective(seed):
    """Mean reward less tau KL, against the mean over draws of r - tau log(pi / pi_bar)."""
    b = Bandit(seed)
    regularized = b.r - TAU * per_draw(b.log_pi - b.log_pi_bar)
    return b.E(b.pi, b.r) - TAU * KL(b.log_pi, b.log_pi_bar) - b.E(b.pi, regularized)

@equation(2)
def best_policy(seed):
    """The formula against the maximizer that mirror ascent finds; no random policy is better."""
    b = Bandit(seed)
    pi_B = b.pi_bar * (b.r_bar / TAU).exp() / (b.pi_bar * (b.r_bar / TAU).exp()).sum()
    others = torch.randn(1000, 5, generator=generator(seed)).softmax(-1)
    assert b.eta(others, b.r_bar).max() < b.eta(pi_B, b.r_bar)
    return pi_B - b.maximizer(b.r_bar).exp()

@equation(3)
def kl_to_the_best_policy(seed):
    """PyTorch's KL against the mean of the log ratio."""
    b = Bandit(seed)
    log_B = b.maximizer(b.r_bar)
    return KL(b.log_pi, log_B) - (b.pi * (b.log_pi - log_B)).sum()

@equation(4)
def kl_with_the_best_policy_inserted(seed):
    """The policy in the KL is the one that mirror ascent finds."""
    b = Bandit(seed)
    log_E = (b.pi_bar * (b.r_bar / TAU).exp()).sum().log()
    right = (b.pi * (b.log_pi - b.log_pi_bar - b.r_bar / TAU + log_E)).sum()
    return KL(b.log_pi, b.maximizer(b.r_bar)) - right

@equation(5)
def kl_in_three_terms(seed):
    """As Eq. 4, with the mean reward over draws."""
    b = Bandit(seed)
    log_E = (b.pi_bar * (b.r_bar / TAU).exp()).sum().log()
    right = KL(b.log_pi, b.log_pi_bar) - b.E(b.pi, b.r / TAU) + log_E
    return KL(b.log_pi, b.maximizer(b.r_bar)) - right

@equation(6)
def objective_is_a_constant_less_a_kl(seed):
    """The objective over draws, against its maximum less tau KL to the policy that attains it."""
    b = Bandit(seed)
    left = b.E(b.pi, b.r - TAU * per_draw(b.log_pi - b.log_pi_bar))
    maximum = TAU * (b.pi_bar * (b.r_bar / TAU).exp()).sum().log()
    return left - (maximum - TAU * KL(b.log_pi, b.maximizer(b.r_bar)))

@equation(7)
def policy_gradient(seed):
    """Means of the score times r over draws, against autograd of eta; pi_theta is a softmax."""
    b = Bandit(seed)
    log_pi = b.q(b.theta).log_softmax(-1)
    score = per_draw(b.grad(lambda theta: b.q(theta).log_softmax(-1)))
    grad_KL = b.grad(lambda theta: KL(b.q(theta).log_softmax(-1), b.log_pi_bar))
    right = b.E(log_pi.exp(), score * b.r[..., None] - TAU * grad_KL)
    return b.grad(lambda theta: b.eta(b.q(theta).softmax(-1), b.r_bar)) - right

@equation(8)
def squared_error(seed):
    """The mean over draws against squared bias plus variance, for any sampling pi."""
    b = Bandit(seed)
    variance = (b.p * b.r**2).sum(-1) - b.r_bar**2
    return b.loss(b.theta, b.pi) - (b.pi * ((b.q(b.theta) - b.r_bar) ** 2 + variance)).sum() / 2

@equation(9)
def squared_error_gradient(seed):
    """Autograd against the mean over draws. The sampling pi is held fixed, also if it is pi_B."""
    b = Bandit(seed)
    q, grad_q = b.q(b.theta), b.grad(b.q)
    residual = []
    for pi in (b.pi, b.log_B(b.theta).exp()):
        right = b.E(pi, per_draw(grad_q) * (per_draw(q) - b.r)[..., None])
        residual.append(b.grad(lambda theta, pi=pi: b.loss(theta, pi)) - right)
    assert size(b.grad(lambda theta: b.loss(theta, b.log_B(theta).exp())) - right) > 0.01
    return residual

@equation(10)
def boltzmann_policy(seed):
    """It sums to one, and there the gradient of eta with q for r_bar, by the logits, is zero."""
    b = Bandit(seed)
    q = b.q(b.theta)
    pi_B = b.pi_bar * (q / TAU).exp() / (b.pi_bar * (q / TAU).exp()).sum()
    return pi_B.sum() - 1, jacobian(lambda x: b.eta(x.softmax(-1), q), pi_B.log())

@equation(11, margin=0.04)
def v(seed):
    """Against the maximum of eta with q for r_bar, by mirror ascent.

    Printed with exp(q) / tau: q has a unit, and Eq. 12 would not sum to one.
    """
    b = Bandit(seed)
    q = b.q(b.theta)
    maximum = b.eta(b.maximizer(q).exp(), q)
    corrected = TAU * (b.pi_bar * (q / TAU).exp()).sum().log()
    printed = TAU * (b.pi_bar * q.exp() / TAU).sum().log()
    return corrected - maximum, printed - maximum

@equation(12)
def boltzmann_policy_by_v(seed):
    """Against the maximizer that mirror ascent finds, with v of Eq. 11."""
    b = Bandit(seed)
    q = b.q(b.theta)
    return b.pi_bar * ((q - b.v(b.theta)) / TAU).exp() - b.maximizer(q).exp()

@equation(13)
def v_is_the_objective(seed):
    """The log-sum-exp of Eq. 11 against mean q less tau times PyTorch's KL."""
    b = Bandit(seed)
    return b.v(b.theta) - (b.log_B(b.theta).exp() @ b.q(b.theta) - TAU * b.KL(b.theta))

@equation(14)
def q_by_v_and_policy(seed):
    """With the policy that mirror ascent finds."""
    b = Bandit(seed)
    q = b.q(b.theta)
    return q - (b.v(b.theta) + TAU * (b.maximizer(q) - b.log_pi_bar))

@equation(15)
def squared_error_gradient_by_complex_steps(seed):
    """Eq. 9 again, the left side without autograd. The sampling pi is held fixed."""
    b = Bandit(seed)
    error = per_draw(b.q(b.theta)) - b.r
    right = b.E(b.pi, per_draw(b.grad(b.q)) * error[..., None])
    return complex_step(lambda theta: b.loss(theta, b.pi), b.theta) - right

def error_by_v_and_policy(b):
    """q - r with Eq. 14 for q, (A, K, 1)."""
    q = b.v(b.theta) + TAU * (b.log_B(b.theta) - b.log_pi_bar)
    return (per_draw(q) - b.r)[..., None]

@equation(16)
def squared_error_gradient_with_q_replaced(seed):
    """Autograd of the loss against means over draws from any fixed pi, with Eq. 14 for q."""
    b = Bandit(seed)
    grad_q = b.grad(lambda theta: b.v(theta) + TAU * (b.log_B(theta) - b.log_pi_bar))
    right = b.E(b.pi, per_draw(grad_q) * error_by_v_and_policy(b))
    return b.grad(lambda theta: b.loss(theta, b.pi)) - right

@equation(17)
def squared_error_gradient_in_two_parts(seed):
    """As Eq. 16, with the gradients of log pi_B and of v apart."""
    b = Bandit(seed)
    error = error_by_v_and_policy(b)
    policy_part = TAU * per_draw(b.grad(b.log_B)) * error
    right = b.E(b.pi, policy_part + b.grad(b.v) * error)
    return b.grad(lambda theta: b.loss(theta, b.pi)) - right

@equation(18)
def kl_gradient_of_the_sum(seed):
    """Autograd of PyTorch's KL against complex steps on the sum."""
    b = Bandit(seed)

    def total(theta):
        pi_B = b.pi_bar * (b.q(theta) / TAU).exp()
        pi_B = pi_B / pi_B.sum()
        return (pi_B * (pi_B / b.pi_bar).log()).sum()

    return b.grad(b.KL) - complex_step(total, b.theta)

@equation(19)
def kl_gradient_by_the_product_rule(seed):
    """Each action's term against autograd of it, as the second part of the bracket sums to zero."""
    b = Bandit(seed)
    pi_B, grad_pi = b.log_B(b.theta).exp(), b.grad(lambda theta: b.log_B(theta).exp())
    terms = grad_pi * ((pi_B / b.pi_bar).log() + pi_B * (1 / pi_B))[:, None]
    each = b.grad(lambda theta: b.log_B(theta).exp() * (b.log_B(theta) - b.log_pi_bar))
    return terms - each, terms.sum(0) - b.grad(b.KL)

@equation(20)
def kl_gradient_with_the_score(seed):
    """Autograd of PyTorch's KL against the sum; its terms differ from those of Eq. 19."""
    b = Bandit(seed)
    pi_B = b.log_B(b.theta).exp()
    terms = pi_B[:, None] * b.grad(b.log_B) * (pi_B / b.pi_bar).log()[:, None]
    each = b.grad(lambda theta: b.log_B(theta).exp() * (b.log_B(theta) - b.log_pi_bar))
    assert size(terms - each) > 0.01
    return b.grad(b.KL) - terms.sum(0)

@equation(21, "pgql_equiv.kl_divergence")
def kl_gradient_as_a_mean(seed):
    """Autograd of the script's KL against the mean over draws of the score times the log ratio."""
    b = Bandit(seed)
    log_B = b.log_B(b.theta)
    left = b.grad(lambda theta: pgql_equiv.kl_divergence(b.log_B(theta), b.log_pi_bar))
    score_times_ratio = b.grad(b.log_B) * (log_B - b.log_pi_bar)[:, None]
    return left - b.E(log_B.exp(), per_draw(score_times_ratio).expand(-1, b.r.shape[1], -1))

def least(*readings):
    """The reading of a printed formula that is nearest to right."""
    return min(map(size, readings))

@equation(22, margin=0.05)
def squared_error_gradient_on_policy(seed):
    """Autograd of the loss, draws from a fixed pi_B, against the two means.

    Printed with the gradient before the second mean. It acts on v alone: on the bracket, or on
    the law of the draws, it adds terms that Eq. 17 does not have.
    """
    b = Bandit(seed)
    pi_B, v = b.log_B(b.theta).exp(), b.v(b.theta)
    left = b.grad(lambda theta: b.loss(theta, pi_B))
    score, excess = per_draw(b.grad(b.log_B)), v + TAU * b.KL(b.theta) - b.r
    first = b.E(pi_B, TAU * score * (v - b.r)[..., None] + TAU**2 * b.grad(b.KL))
    second = b.E(pi_B, b.grad(b.v) * excess[..., None])

    def printed(theta, pi):
        return b.E(pi, b.v(theta) * (b.v(theta) + TAU * b.KL(theta) - b.r))

    fixed, moving = (b.grad(lambda theta: printed(theta, pi_B)),
                     b.grad(lambda theta: printed(theta, b.log_B(theta).exp())))
    return left - first - second, least(left - first - fixed, left - first - moving)

@equation(23, margin=0.01)
def policy_gradient_and_value_error(seed):
    """Autograd of the loss, draws from a fixed pi_B, against -tau grad eta and the value error.

    Printed without stop-gradients in the value error: its target and the law of its draws must
    be fixed. The law in the first term must not be, so one gradient sign cannot mean both.
    """
    b = Bandit(seed)
    pi_B = b.log_B(b.theta).exp()
    left = b.grad(lambda theta: b.loss(theta, pi_B))

    def eta(theta, pi):
        return b.E(pi, b.r - TAU * b.KL(theta))

    def value_error(theta, pi, at):
        return b.E(pi, 0.5 * (b.v(theta) - (b.r - TAU * b.KL(at))) ** 2)

    policy = -TAU * b.grad(lambda theta: eta(theta, b.log_B(theta).exp()))
    value = b.grad(lambda theta: value_error(theta, pi_B, b.theta))
    printed = (b.grad(lambda theta: value_error(theta, b.log_B(theta).exp(), theta)),
               b.grad(lambda theta: value_error(theta, b.log_B(theta).exp(), b.theta)),
               b.grad(lambda theta: value_error(theta, pi_B, theta)))
    assert size(policy + TAU * b.grad(lambda theta: eta(theta, pi_B))) > 1e-3
    return left - policy - value, least(*(left - policy - x for x in printed))
