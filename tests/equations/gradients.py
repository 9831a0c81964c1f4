"""Sections 3.6, 4 and 6: what the scripts minimize and regress to, against exact sums."""
import itertools

import torch

import a2c_naive
import a2c_proper
import pgql_equiv
import soft_dqn
from equations.base import equation, generator, size
from exact import MDP, Model

TAU, GAMMA, C = 0.3, 0.9, 0.5

class OneQ(Model):
    """Section 4: the network is Q (S, A); log pi and V are what Eq. 55 and 56 make of it."""
    def __init__(self, mdp, seed):
        super().__init__(mdp, seed)
        self.log_pi_bar = mdp.log_pi_bar

    def Q(self):
        return self.weights[0].tanh() @ self.weights[1]

    def __call__(self):
        Q = self.Q()
        V = TAU * (self.log_pi_bar.exp() * (Q / TAU).exp()).sum(-1).log()
        return self.log_pi_bar + (Q - V[:, None]) / TAU, V

class Paths:
    """Every path of n steps through a random MDP with endings, under the policy of a network.

    log_pi (S, A), V, KL (S,) are its tables, J_log_pi, J_V, J_KL (.., D) their Jacobians in its
    weights; p (P,) has the probabilities of the paths, differentiable. s, a, s_next, r, ends, kl,
    log_ratio, live (n, P), score, grad_V, grad_kl (n, P, D) belong to their steps, s_n to what
    follows; at step t, n - t steps are to go. live is 1 until the first game ends, which with
    over=True is at the last step.
    """
    def __init__(self, seed, model=Model, n=3, over=False):
        self.mdp, self.n = MDP(seed), n
        self.model = model(self.mdp, seed + 50)
        self.log_pi, self.V = self.model()
        self.pi, ratio = self.log_pi.exp().detach(), self.log_pi - self.mdp.log_pi_bar
        self.KL = (self.log_pi.exp() * ratio).sum(-1)
        steps = range(self.mdp.A), range(self.mdp.S)
        paths = torch.tensor(list(itertools.product(range(self.mdp.S), *(steps * n)))).T
        s, self.a, self.s_next, self.s_n = paths[:-1:2], paths[1::2], paths[2::2], paths[-1]
        self.s, self.log_pi_bar = s, self.mdp.log_pi_bar[s]
        self.p = self.probability([self.log_pi] * n)
        self.r, self.ends = self.mdp.r[s, self.a], self.mdp.ends[s, self.a]
        if over:
            self.ends[-1] = 1
        self.live = torch.cat([torch.ones(1, s.shape[1]), 1 - self.ends[:-1]]).cumprod(0)
        self.kl, self.log_ratio = self.KL.detach()[s], ratio.detach()[s, self.a]
        self.J_log_pi, self.J_V, self.J_KL = map(self.jacobian, (self.log_pi, self.V, self.KL))
        self.score, self.grad_V = self.J_log_pi[s, self.a], self.J_V[s]
        self.grad_kl = self.J_KL[s]

    def probability(self, policies):
        """(P,) under a log pi (S, A) for each step."""
        s, a = self.s, self.a
        chosen = sum(log_pi[s[t], a[t]] for t, log_pi in enumerate(policies))
        return self.mdp.start[s[0]] * chosen.exp() * self.mdp.p[s, a, self.s_next].prod(0)

    def jacobian(self, table):
        rows = [self.model.gradient(x) for x in table.flatten()]
        return torch.stack(rows).view(*table.shape, -1)

    def forward(self, x, gamma, V_n):
        """sum_{d<n-t} gamma^d x_{t+d} + gamma^{n-t} V_n for each t, as far as the game goes."""
        x, rows = torch.cat([x, V_n[None]]), []
        for t in range(self.n):
            alive = torch.cat([torch.ones_like(x[:1]), 1 - self.ends[t:]]).cumprod(0)
            d = torch.arange(self.n - t + 1.0)[:, None]
            rows.append((gamma**d * alive * x[t:]).sum(0))
        return torch.stack(rows)

    def deltas(self, V):
        """sum_{d<n-t} gamma^d delta_{t+d}, delta of Eq. 36, for a table V (S,)."""
        delta = (self.r - TAU * self.kl) + GAMMA * (1 - self.ends) * V[self.s_next] - V[self.s]
        return self.forward(delta, GAMMA, torch.zeros_like(self.p))

    def given(self, x):
        """E[x_t | s_t = s], (n, P, ..) -> (n, S, ..)."""
        weight = self.p.detach()[:, None] * torch.eye(self.mdp.S)[self.s]
        mean = torch.einsum("tps,tp...->ts...", weight, x)
        return mean / weight.sum(1).view(*mean.shape[:2], *[1] * (mean.ndim - 2))

    def total(self, x):
        """E[sum over the steps t of a game of x_t], (n, P, D) -> (D,)."""
        return torch.einsum("tp,tpd->d", self.p.detach() * self.live, x)

    def backups(self, V, tau):
        """Q (n, S, A) and V (n, S) with n - t steps to go and V (S,) after them: Eq. 33 and 26."""
        Qs, Vs, kl = [], [], self.KL.detach()
        for _ in range(self.n):
            Q = self.mdp.r + GAMMA * (1 - self.mdp.ends) * (self.mdp.p @ V)
            V = (self.pi * Q).sum(-1) - tau * kl
            Qs.append(Q)
            Vs.append(V)
        return torch.stack(Qs[::-1]), torch.stack(Vs[::-1])

    def exact_values(self, tau):
        """Q_pi (S, A) and V_pi (S,) of games without a horizon, by a linear solve of Eq. 24."""
        alive = GAMMA * (1 - self.mdp.ends)
        P = torch.einsum("sa,sax->sx", self.pi * alive, self.mdp.p)
        reward = (self.pi * self.mdp.r).sum(-1) - tau * self.KL.detach()
        V = torch.linalg.solve(torch.eye(self.mdp.S) - P, reward)
        return self.mdp.r + alive * (self.mdp.p @ V), V

    def exact_gradient(self, multiplier):
        """E_a[grad log pi multiplier] - tau grad KL for each s, (.., S, A) -> (.., S, D)."""
        ascent = torch.einsum("sa,sad,...sa->...sd", self.pi, self.J_log_pi, multiplier)
        return ascent - TAU * self.J_KL

    def leaves(self, V):
        """log pi (n, P, A) and V (n, P) as a network returns them."""
        return [x.requires_grad_() for x in (self.log_pi.detach()[self.s], V.detach().clone())]

    def each(self, loss, leaves):
        """The gradient in the weights of every sample's part of a sum, (n, P, D)."""
        dlog_pi, dV = torch.autograd.grad(loss, leaves, retain_graph=True)
        gradient = torch.einsum("tpa,tpad->tpd", dlog_pi, self.J_log_pi[self.s])
        return gradient + dV[..., None] * self.grad_V

    def losses(self, script, V, V_n, gamma=GAMMA, c=0.0):
        """An A2C script's terms, as numbers, and the gradient of each sample's part of its loss,
        (n, P, D); with c = 0 that is the policy's."""
        leaves = self.leaves(V)
        L, terms = script.losses(*leaves, self.a, self.r, self.ends, V_n, self.log_pi_bar, TAU,
                                 gamma, c)
        gradient = self.each(L * self.r.numel(), leaves)
        return {name: term.detach() for name, term in terms.items()}, gradient

    def samples(self):
        """What pgql_equiv.py makes of the paths, and the leaves in it; V is the network's."""
        leaves = self.leaves(self.V[self.s])
        return pgql_equiv.samples(*leaves, self.a, self.r, self.ends, self.V.detach()[self.s_n],
                                  self.log_pi_bar, TAU, GAMMA), leaves

# --- section 3.6: policy gradients ---
@equation(48, "a2c_naive.losses")
def naive_gradient(seed):
    """Sample by sample, and the script's mean over games of up to three steps against autograd
    through the paths' probabilities, with the visits that KL is charged on held fixed."""
    x = Paths(seed, over=True)
    none = torch.zeros_like(x.p)
    script = -x.losses(a2c_naive, torch.zeros_like(x.r), none, gamma=1.0)[1]
    formula = x.score * x.forward(x.r, 1.0, none)[..., None] - TAU * x.grad_kl
    reward, visits = (x.p * x.live * x.r).sum(), x.p.detach() * x.live
    exact = x.model.gradient(reward - TAU * (visits * x.KL[x.s]).sum())
    proper = x.model.gradient((x.p * x.live * (x.r - TAU * x.KL[x.s])).sum())
    assert size(exact - proper) > 1e-3, "the regularized return has another gradient"
    return [script - formula, x.total(script) - exact]

@equation(49, "a2c_proper.losses")
def discounted_gradient(seed):
    """Sample by sample, and the script's mean over games of up to three steps against autograd: for
    each t the return discounted from t on is differentiated in the policy of step t alone."""
    x = Paths(seed, over=True)
    none, frozen, exact = torch.zeros_like(x.p), x.log_pi.detach(), 0.0
    script = -x.losses(a2c_proper, torch.zeros_like(x.r), none)[1]
    multiplier = x.forward(x.r - TAU * x.kl, GAMMA, none)
    for t in range(x.n):
        p = x.probability([x.log_pi if k == t else frozen for k in range(x.n)])
        kl = torch.cat([x.KL[x.s[t:t + 1]], x.kl[t + 1:]])
        powers = GAMMA ** torch.arange(x.n - t)[:, None]
        returns = (powers * x.live[t:] * (x.r[t:] - TAU * kl)).sum(0)
        exact = exact + x.model.gradient((p * returns).sum())
    formula = x.score * multiplier[..., None] - TAU * x.grad_kl
    return [script - formula, x.total(script) - exact]

@equation(50, "a2c_proper.losses")
def gradient_by_value_functions(seed):
    """The script's returns of Eq. 49, averaged for each s_t, against Q_pi and V_pi by dynamic
    programming over the steps left; the multiplier of Eq. 50 has mean zero in each state."""
    x = Paths(seed, over=True)
    script = -x.losses(a2c_proper, torch.zeros_like(x.r), torch.zeros_like(x.p))[1]
    Q, V = x.backups(torch.zeros(x.mdp.S), TAU)
    multiplier = Q - TAU * x.KL.detach()[:, None] - V[..., None]
    return [x.given(script) - x.exact_gradient(multiplier), (x.pi * multiplier).sum(-1)]

@equation(51, "a2c_proper.losses")
def gradient_of_the_return(seed):
    """At gamma = 1 the script's sum over a game of up to T = 3 steps is the gradient of the
    expected regularized return, by autograd through the probability of every path."""
    x = Paths(seed, over=True)
    script = -x.losses(a2c_proper, x.V[x.s], torch.zeros_like(x.p), gamma=1.0)[1]
    objective = (x.p * x.live * (x.r - TAU * x.KL[x.s])).sum()
    return x.total(script) - x.model.gradient(objective)

@equation(52, "a2c_proper.losses", margin=0.025)
def n_step_gradient(seed):
    """Printed without -tau grad KL(s_t). With V = V_pi the corrected estimator has the mean of Eq.
    50 in every state, Q_pi and V_pi by a linear solve; the script has it sample by sample."""
    x = Paths(seed)
    Q, V = x.exact_values(TAU)
    exact = x.exact_gradient(Q)  # what depends on s_t alone would have mean zero
    printed = x.score * x.deltas(V)[..., None]
    corrected = printed - TAU * x.grad_kl
    script = -x.losses(a2c_proper, V[x.s], V[x.s_n])[1]
    return [script - corrected, x.given(corrected) - exact], x.given(printed) - exact

@equation(53, "a2c_proper.losses")
def value_regression(seed):
    """With y_t held fixed the gradient in a table V, averaged for each s_t, is V - T^n V_old by
    dynamic programming, zero at the backup; if V moves y_t as well it is another."""
    x = Paths(seed)
    V, old = torch.randn(2, x.mdp.S, generator=generator(seed)).requires_grad_()
    y, literal = (x.forward(x.r - TAU * x.kl, GAMMA, table[x.s_n]) for table in (old.detach(), V))
    _, backup = x.backups(old.detach(), TAU)

    def in_table(y):
        return torch.autograd.grad((x.p.detach() * 0.5 * (V[x.s] - y) ** 2).sum(), V)[0]

    assert size(in_table(literal) - in_table(literal.detach())) > 0.1
    leaves = x.leaves(V[x.s])
    _, terms = a2c_proper.losses(*leaves, x.a, x.r, x.ends, old[x.s_n], x.log_pi_bar, TAU, GAMMA, C)
    gradient, = torch.autograd.grad(terms["value_loss"] * y.numel(), leaves[1])
    return [terms["value_loss"].detach() - 0.5 * (V.detach()[x.s] - y).square().mean(),
            x.given(gradient) - (V - backup).detach()]

@equation(54, "a2c_proper.n_step_returns", "pgql_equiv.samples", margin=0.07)
def value_target(seed):
    """Printed without -tau KL in the first form and with gamma^d V(s_{t+d}), where d has no value:
    neither d = n - 1, nor d under the sum, nor d = n gives E[y_t | s_t] = T^n V (Eq. 34)."""
    x = Paths(seed)
    V = x.V.detach()
    last = V[x.s_n]
    _, backup = x.backups(V, TAU)
    y = a2c_proper.n_step_returns(x.r - TAU * x.kl, x.ends, last, GAMMA)
    second = V[x.s] + x.deltas(V)
    at_last = torch.cat([x.r[:-1], x.r[-1:] + V[x.s[-1:]]])
    readings = (x.forward(at_last, GAMMA, 0 * last), x.forward(x.r + V[x.s], GAMMA, 0 * last),
                x.forward(x.r, GAMMA, last))
    printed = min(size(x.given(reading)[0] - backup[0]) for reading in readings)
    return [y - second, x.samples()[0].V_hat - second, x.given(second) - backup], printed

# --- section 4: the gradient of soft Q-learning ---
def outputs(seed, B=6, A=4):
    """Random Q (B, A) and log pi_bar (B, A), which is not uniform."""
    Q, log_pi_bar = torch.randn(2, B, A, generator=generator(seed))
    return Q, log_pi_bar.log_softmax(-1)

@equation(55, "pgql_equiv.policy_and_value")
def value_of_q(seed):
    """The script's V, against the sum over actions as it stands. E_a is over pi_bar: over pi_theta
    it is not the value."""
    Q, log_pi_bar = outputs(seed)
    log_pi, V = pgql_equiv.policy_and_value(Q, log_pi_bar, TAU)
    mean, over_pi = ((law.exp() * (Q / TAU).exp()).sum(-1) for law in (log_pi_bar, log_pi))
    assert size(V - TAU * over_pi.log()) > 0.1
    return V - TAU * mean.log()

@equation(56, "pgql_equiv.policy_and_value")
def policy_of_q(seed):
    """The script's policy, a softmax, against the exponential with V summed by hand."""
    Q, log_pi_bar = outputs(seed)
    log_pi, _ = pgql_equiv.policy_and_value(Q, log_pi_bar, TAU)
    V = TAU * (log_pi_bar.exp() * (Q / TAU).exp()).sum(-1, keepdim=True).log()
    return log_pi.exp() - log_pi_bar.exp() * ((Q - V) / TAU).exp()

@equation(57, "pgql_equiv.policy_and_value")
def q_of_policy_and_value(seed):
    """Q from the script's policy and value, which were made of it."""
    Q, log_pi_bar = outputs(seed)
    log_pi, V = pgql_equiv.policy_and_value(Q, log_pi_bar, TAU)
    return V[:, None] + TAU * (log_pi.exp() / log_pi_bar.exp()).log() - Q

class Regression(Paths):
    """The same for a Q network: y (n, P) is Eq. 46 with the current Q, left (n, P, D) Eq. 59."""
    def __init__(self, seed):
        super().__init__(seed, OneQ)
        V, Q = self.V.detach(), self.model.Q()
        self.V_t, self.Q_t = V[self.s], Q[self.s, self.a]
        self.grad_Q = self.jacobian(Q)[self.s, self.a]
        self.y = TAU * self.kl + self.forward(self.r - TAU * self.kl, GAMMA, V[self.s_n])
        self.Delta = self.deltas(V)
        self.error = (self.Q_t - self.y).detach()
        self.left = self.grad_Q * self.error[..., None]
        self.batch, self.outputs = self.samples()

    def script(self, loss, c=1 / TAU):
        """The gradient of each sample of pg_loss or ql_loss, times tau: of 1/2 (Q - y)^2."""
        return TAU * self.each(loss(self.batch, TAU, c).sum(), self.outputs)

    def objective(self, p, y):
        """Eq. 58, summed over the steps."""
        return (p * 0.5 * (self.Q_t - y) ** 2).sum()

@equation(58, "pgql_equiv.samples", "pgql_equiv.ql_loss")
def q_regression(seed):
    """Autograd of the squared error of the Q network, y_t and the laws of s_t and a_t held fixed,
    against the script's loss. If a_t ~ pi_theta or y_t is differentiated as well, it is another."""
    x = Regression(seed)
    p = x.p.detach()
    exact = x.model.gradient(x.objective(p, x.y))
    moved = TAU * x.KL[x.s] + x.forward(x.r - TAU * x.KL[x.s], GAMMA, x.V[x.s_n])
    for other in (x.objective(x.p, x.y), x.objective(p, moved)):
        assert size(x.model.gradient(other) - exact) > 1e-2
    return torch.einsum("p,tpd->d", p, x.script(pgql_equiv.ql_loss)) - exact

@equation(59, "pgql_equiv.samples", "pgql_equiv.q_error")
def gradient_within_the_mean(seed):
    """The Jacobian of the Q network times the script's error, averaged, against autograd of Eq. 58;
    the error also sample by sample."""
    x = Regression(seed)
    error = pgql_equiv.q_error(x.batch, TAU).detach()
    mean = torch.einsum("p,tpd->d", x.p.detach(), x.grad_Q * error[..., None])
    return [mean - x.model.gradient(x.objective(x.p.detach(), x.y)), error - x.error]

@equation(60, "pgql_equiv.samples", "pgql_equiv.q_error", margin=0.1)
def error_with_q_replaced(seed):
    """Sample by sample. Printed with -tau KL in the target, which Eq. 47 has with a plus: also on
    average over a_t that is another gradient."""
    x = Regression(seed)
    Q = TAU * x.log_ratio + x.V_t
    corrected = Q - (x.V_t + TAU * x.kl + x.Delta)
    printed = x.grad_Q * (Q - (x.V_t - TAU * x.kl + x.Delta))[..., None]
    error = pgql_equiv.q_error(x.batch, TAU).detach()
    return ([x.grad_Q * corrected[..., None] - x.left, error - corrected],
            x.given(printed) - x.given(x.left))

@equation(61, "pgql_equiv.samples", "pgql_equiv.q_error")
def error_without_v(seed):
    """Sample by sample: from the script's terms, and against the error of the Q network."""
    x = Regression(seed)
    script, Delta = x.batch, x.batch.V_hat - x.batch.V
    error = (TAU * script.log_ratio - TAU * script.KL - Delta).detach()
    whole = pgql_equiv.q_error(script, TAU).detach()
    return [x.grad_Q * error[..., None] - x.left, whole - error]

@equation(62, "pgql_equiv.samples", "pgql_equiv.ql_loss")
def gradient_with_q_replaced(seed):
    """Sample by sample: the script's loss with c = 1/tau, times tau, and the product as it stands,
    against the gradient through the Q network."""
    x = Regression(seed)
    error = TAU * x.log_ratio - TAU * x.kl - x.Delta
    product = (TAU * x.score + x.grad_V) * error[..., None]
    return [x.script(pgql_equiv.ql_loss) - x.left, product - x.left]

def expanded(x, star, two_stars):
    """The terms of Eq. 63 (n, P, D) with the signs of KL at (*) and (**)."""
    ratio, kl, Delta = (y[..., None] for y in (x.log_ratio, x.kl, x.Delta))
    return (TAU**2 * x.score * ratio + star * TAU**2 * x.score * kl - TAU * x.score * Delta
            + TAU * x.grad_V * ratio + two_stars * TAU * x.grad_V * kl - x.grad_V * Delta)

@equation(63, "pgql_equiv.samples", "pgql_equiv.ql_loss", margin=0.1)
def gradient_expanded(seed):
    """Sample by sample. Printed with a plus before both KL: at (*) that shows in a sample only, as
    E[grad log pi] = 0, at (**) on average over a_t, where it leaves 2 tau KL grad V."""
    x = Regression(seed)
    script, exact = x.script(pgql_equiv.ql_loss), x.given(x.left)
    excess = (x.log_ratio - x.kl)[..., None] * x.grad_V
    corrected, at_star = expanded(x, -1, -1), expanded(x, 1, -1)
    assert size(at_star - x.left) > 0.01
    return ([corrected - script, corrected - x.left, x.given(at_star) - exact, x.given(excess)],
            x.given(expanded(x, 1, 1)) - exact)

@equation(64, "pgql_equiv.samples", "pgql_equiv.ql_loss", margin=0.06)
def gradient_averaged(seed):
    """Averaged over a_t for each s_t by itself. Printed with -tau^2 grad KL, while by Eq. 21
    E[grad log pi log_ratio] is plus grad KL."""
    x = Regression(seed)
    rest = -TAU * x.score * x.Delta[..., None] - x.grad_V * x.Delta[..., None]
    corrected, printed = (sign * TAU**2 * x.grad_kl + rest for sign in (1, -1))
    script, exact = x.given(x.script(pgql_equiv.ql_loss)), x.given(x.left)
    return [x.given(corrected) - exact, script - exact], x.given(printed) - exact

@equation(65, "pgql_equiv.samples", "pgql_equiv.pg_loss")
def gradients_are_equal(seed):
    """Averaged over a_t for each s_t by itself: tau times the script's policy gradient at c =
    1/tau, against that through the Q network; not for one sample, nor with another c."""
    x = Regression(seed)
    script = x.script(pgql_equiv.pg_loss)
    assert size(script - x.left) > 0.1
    assert size(x.given(x.script(pgql_equiv.pg_loss, C) - x.left)) > 0.1
    return x.given(script) - x.given(x.left)

# --- section 6: what the scripts run ---
@equation(79, "a2c_naive.losses", margin=0.1)
def naive_estimator(seed):
    """Printed with +tau grad KL and without the bootstrap. With V the value of the plain rewards,
    the corrected estimator has the mean of Eq. 48, discounted, in each state, by a linear solve."""
    return estimator(seed, a2c_naive, tau=0.0)

@equation(80, "a2c_proper.losses", margin=0.1)
def proper_estimator(seed):
    """Printed with +tau grad KL and without the bootstrap. With V = V_pi the corrected estimator
    has the mean of Eq. 50 in each state, by a linear solve."""
    return estimator(seed, a2c_proper, TAU)

def estimator(seed, script, tau):
    """Eq. 79 with tau = 0 in the returns, Eq. 80 with TAU; either correction alone fails too."""
    x = Paths(seed)
    Q, V = x.exact_values(tau)
    exact = x.exact_gradient(Q)

    def bracket(bootstrap):
        return x.forward(x.r - tau * x.kl, GAMMA, bootstrap * V[x.s_n]) - V[x.s]

    def formula(bootstrap, sign):
        return x.score * bracket(bootstrap)[..., None] + sign * TAU * x.grad_kl

    corrected = formula(1, -1)
    for half in (formula(1, 1), formula(0, -1)):
        assert size(x.given(half) - exact) > 0.01
    sampled = -x.losses(script, V[x.s], V[x.s_n])[1]
    return ([sampled - corrected, x.given(corrected) - exact, x.given(bracket(1))],
            x.given(formula(0, 1)) - exact)

def transitions(seed, B=6, A=4):
    """Random Q (B, A) of the next states, rewards, and endings, of which there are both kinds."""
    g = generator(seed)
    Q, r = torch.randn(B, A, generator=g), torch.randn(B, generator=g)
    done = (torch.rand(B, generator=g) < 0.4).double()
    done[:2] = torch.tensor([0.0, 1.0])
    return Q, r, done

def backup(Q, r, done, log_pi_bar, tau):
    """The script's one-step target."""
    return soft_dqn.targets(r[None], done[None], Q[None], log_pi_bar, tau, GAMMA)

def optimum(Q, log_pi_bar):
    """max over pi of E[Q] - TAU KL[pi || pi_bar], at the Boltzmann policy: Eq. 27."""
    pi = (Q / TAU).softmax(-1)  # pi_bar is constant
    return (pi * (Q - TAU * (pi.log() - log_pi_bar))).sum(-1)

@equation(81, "soft_dqn.targets", "soft_dqn.soft_value")
def hard_backup(seed):
    """The script's target at tau = 0, against the best of the four actions."""
    Q, r, done = transitions(seed)
    best = torch.tensor([max(row) for row in Q.tolist()])
    return backup(Q, r, done, torch.tensor(0.0), 0.0) - (r + GAMMA * (1 - done) * best)

@equation(82, "soft_dqn.targets", "soft_dqn.soft_value", margin=0.6)
def soft_backup_with_kl(seed):
    """Printed without tau before the log-sum-exp, and without gamma tau before log|A|: not in units
    of reward, nor the value of the best policy (Eq. 27). log|A| is masked where the game ends."""
    Q, r, done = transitions(seed)
    lse, log_A, go_on = (Q / TAU).exp().sum(-1).log(), torch.tensor(Q.shape[1]).log(), 1 - done
    exact = r + go_on * GAMMA * optimum(Q, -log_A)
    for wrong in (go_on * (GAMMA * TAU * lse - log_A), go_on * (GAMMA * TAU * lse - TAU * log_A),
                  go_on * GAMMA * TAU * lse - GAMMA * TAU * log_A, go_on * GAMMA * (lse - log_A)):
        assert size(r + wrong - exact) > 0.02
    corrected = r + GAMMA * go_on * TAU * (lse - log_A)
    printed = r + go_on * (GAMMA * lse - log_A)
    return [backup(Q, r, done, -log_A, TAU) - corrected, corrected - exact], printed - exact

@equation(83, "soft_dqn.targets", "soft_dqn.soft_value", margin=0.9)
def soft_backup_with_entropy(seed):
    """Printed without tau before the log-sum-exp: not in units of reward, nor the value of the best
    policy, which Eq. 27 gives with the entropy in place of -KL."""
    Q, r, done = transitions(seed)
    lse, zero = (Q / TAU).exp().sum(-1).log(), torch.tensor(0.0)
    exact = r + GAMMA * (1 - done) * optimum(Q, zero)
    corrected, printed = (r + GAMMA * (1 - done) * factor * lse for factor in (TAU, 1.0))
    return [backup(Q, r, done, zero, TAU) - corrected, corrected - exact], printed - exact

@equation(84, "a2c_proper.losses", "pgql_equiv.samples", "pgql_equiv.pg_loss")
def policy_loss(seed):
    """Delta_t held fixed. The scripts' values against forward sums; the gradient, averaged for each
    s_t, against minus that of Eq. 50 with n steps to go and V after them."""
    x = Paths(seed)
    batch, leaves = x.samples()
    loss = pgql_equiv.pg_loss(batch, TAU, 0.0)
    value = -x.log_pi.detach()[x.s, x.a] * x.deltas(x.V.detach()) + TAU * x.kl
    terms, _ = x.losses(a2c_proper, x.V[x.s], x.V[x.s_n])
    Q, _ = x.backups(x.V.detach(), TAU)
    return [loss.detach() - value, terms["policy_loss"] - value.mean(),
            x.given(x.each(loss.sum(), leaves)) + x.exact_gradient(Q)]

@equation(85, "a2c_proper.losses", "pgql_equiv.samples", "pgql_equiv.pg_loss")
def value_loss(seed):
    """V_hat_t held fixed, Eq. 54 by a forward sum. The scripts' values, and the gradient of each
    sample, (V - V_hat_t) grad V."""
    x = Paths(seed)
    batch, leaves = x.samples()
    loss = pgql_equiv.pg_loss(batch, TAU, 1.0) - pgql_equiv.pg_loss(batch, TAU, 0.0)
    V = x.V.detach()
    error = V[x.s] - x.forward(x.r - TAU * x.kl, GAMMA, V[x.s_n])
    terms, _ = x.losses(a2c_proper, V[x.s], V[x.s_n])
    return [loss.detach() - 0.5 * error**2, terms["value_loss"] - 0.5 * (error**2).mean(),
            x.each(loss.sum(), leaves) - error[..., None] * x.grad_V]

@equation(86, "a2c_naive.losses", "a2c_proper.losses", "pgql_equiv.samples", "pgql_equiv.pg_loss")
def a3c_loss(seed):
    """The three scripts' loss at c = 0.5 and its gradient for each sample, against forward sums.
    That at c = 1/tau it is soft Q-learning is checked under Eq. 65."""
    x, residuals = Paths(seed), []
    V, log_pi_a, (batch, leaves) = x.V.detach(), x.log_pi.detach()[x.s, x.a], x.samples()
    for script, tau in ((a2c_naive, 0.0), (a2c_proper, TAU)):  # tau in the returns
        Delta = x.forward(x.r - tau * x.kl, GAMMA, V[x.s_n]) - V[x.s]
        value = -log_pi_a * Delta + TAU * x.kl + C * 0.5 * Delta**2
        gradient = -(x.score + C * x.grad_V) * Delta[..., None] + TAU * x.grad_kl
        terms, of_script = x.losses(script, V[x.s], V[x.s_n], c=C)
        residuals += [terms["loss"] - value.mean(), of_script - gradient]
    loss = pgql_equiv.pg_loss(batch, TAU, C)
    return [*residuals, loss.detach() - value, x.each(loss.sum(), leaves) - gradient]
