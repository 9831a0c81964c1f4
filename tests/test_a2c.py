"""The paper's section 6.1, numerically: the scripts' own functions against exact sums, float64."""
import math

import pytest
import torch

import a2c_naive
import a2c_proper
from exact import MDP, Model
from util import tiny

TAU, GAMMA, C = 0.3, 0.9, 0.5
pytestmark = pytest.mark.usefixtures("double")

def random_rollout(seed, T=7, N=4, A=3):
    """Arguments of losses(), with endings: log_pi, V, a, r, done, V_n, log_pi_bar."""
    g = torch.Generator().manual_seed(seed)
    log_pi = torch.randn(T, N, A, generator=g).log_softmax(-1)
    a, done = torch.randint(A, (T, N), generator=g), torch.rand(T, N, generator=g) < 0.25
    V, r = torch.randn(2, T, N, generator=g)
    log_pi_bar = torch.randn(A, generator=g).log_softmax(-1)
    return log_pi, V, a, r, done.double(), torch.randn(N, generator=g), log_pi_bar

def expected_gradient(script, mdp, model, n, tau, c):
    """E[gradient of losses()] over all paths of n steps, through the script's own function."""
    total = 0.0
    for probability, s, a in mdp.trajectories(n, model()[0].detach().exp()):
        log_pi, V = model()
        here = s[:-1]
        path = (x[:, None] for x in (log_pi[here], V[here], a, mdp.r[here, a], mdp.ends[here, a]))
        L, _ = script.losses(*path, V[s[-1:]], mdp.log_pi_bar[here][:, None], tau, GAMMA, c)
        total = total + probability * model.gradient(L)
    return total

def exact_gradient(mdp, model, n, tau, c, proper, misprint=0.0):
    """The same from Eq. 79 or 80 as corrected, by dynamic programming over states.

    At step t of n the horizon is n - t. `misprint` adds that multiple of tau grad KL, as the sign
    printed in Eq. 79 and 80 would with 2.
    """
    log_pi, V = model()
    pi, kl = log_pi.exp(), (log_pi.exp() * (log_pi - mdp.log_pi_bar)).sum(-1)
    reward = (mdp.r - tau * kl[:, None] * proper).detach()
    alive, total, targets = 1 - mdp.ends, 0.0, [V.detach()]
    for _ in range(n):  # (S, A) expected returns of horizon 1, 2, .., n
        returns = reward + GAMMA * alive * (mdp.p @ targets[-1])
        targets.append((pi.detach() * returns).sum(-1))
    at = mdp.start
    for t in range(n):
        returns = reward + GAMMA * alive * (mdp.p @ targets[n - t - 1])
        advantage = returns - V.detach()[:, None]
        ascent = (pi * advantage).sum(-1) - (1 - misprint) * tau * kl
        value = 0.5 * (V - targets[n - t]).square()
        total = total + (at * (-ascent + c * value)).sum() / n
        at = torch.einsum("s,sa,sax->x", at, pi.detach(), mdp.p)
    return model.gradient(total)

@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_gradient_is_equation_79_or_80_on_every_state(a2c, seed, n):
    """Audit rows 49, 50, 52, 79, 80 and 84-86, a reference policy that is not uniform."""
    mdp = MDP(seed)
    model, proper = Model(mdp, seed + 100), a2c is a2c_proper
    got = expected_gradient(a2c, mdp, model, n, TAU, C)
    assert (got - exact_gradient(mdp, model, n, TAU, C, proper)).abs().max() < 1e-10
    misprinted = exact_gradient(mdp, model, n, TAU, C, proper, misprint=2.0)
    assert (got - misprinted).abs().max() > 1e-3, "the printed sign must not pass"
    other = exact_gradient(mdp, model, n, TAU, C, not proper)
    assert (got - other).abs().max() > 1e-4, "naive and proper must be told apart"

def test_undiscounted_gradient_is_that_of_the_regularized_return(a2c):
    """Eq. 51, and Eq. 48 for the naive script: autograd through the probability of every path."""
    n, mdp = 3, MDP(7, endings=False)
    model = Model(mdp, 8)
    log_pi, _ = model()
    kl = (log_pi.exp() * (log_pi - mdp.log_pi_bar)).sum(-1)
    objective, expected = 0.0, 0.0
    for probability, s, a in mdp.trajectories(n, log_pi.exp()):
        here = s[:-1]
        if a2c is a2c_proper:
            objective = objective + probability * (mdp.r[here, a] - TAU * kl[here]).sum()
        else:  # the regularizer's effect on later states is left out: visits are constants
            objective = objective + probability * mdp.r[here, a].sum()
            objective = objective - probability.detach() * TAU * kl[here].sum()
        log_pi_path, V = (x[here][:, None] for x in model())
        done = torch.eye(n)[:, -1:]
        L, _ = a2c.losses(log_pi_path, V, a[:, None], mdp.r[here, a][:, None], done,
                          torch.zeros(1), mdp.log_pi_bar[here][:, None], TAU, 1.0, 0.0)
        expected = expected - n * probability.detach() * model.gradient(L)
    assert (model.gradient(objective) - expected).abs().max() < 1e-10

def test_entropy_and_kl_differ_by_a_constant_in_the_reward():
    """Proper: tau log A on every live step. Naive: nothing that has a gradient."""
    A = 3
    log_pi, V, a, r, done, V_n, _ = random_rollout(4, A=A)

    def gradient(script, r, log_pi_bar):
        logits, v = log_pi.clone().requires_grad_(), V.clone().requires_grad_()
        L, _ = script.losses(logits.log_softmax(-1), v, a, r, done, V_n, log_pi_bar, TAU, GAMMA, C)
        return torch.cat([g.flatten() for g in torch.autograd.grad(L, (logits, v))])

    entropy, kl = 0.0, -math.log(A)
    naive = gradient(a2c_naive, r, entropy) - gradient(a2c_naive, r, kl)
    shifted = gradient(a2c_proper, r, entropy) - gradient(a2c_proper, r + TAU * math.log(A), kl)
    assert naive.abs().max() < 1e-12 and shifted.abs().max() < 1e-12
    assert (gradient(a2c_proper, r, entropy) - gradient(a2c_proper, r, kl)).abs().max() > 1e-3

def test_terms_are_means_over_the_batch(a2c):
    """Those of the loss itself are in checks 84 to 86."""
    log_pi, V, a, r, done, V_n, log_pi_bar = random_rollout(6)
    L, terms = a2c.losses(log_pi, V, a, r, done, V_n, log_pi_bar, 0.0, GAMMA, C)
    R = a2c.n_step_returns(r, done, V_n, GAMMA)
    assert abs(L - terms["policy_loss"] - C * terms["value_loss"]) < 1e-12 and terms["loss"] is L
    assert abs(terms["entropy"] + (log_pi.exp() * log_pi).sum(-1).mean()) < 1e-12
    assert abs(terms["V"] - V.sum() / 28) < 1e-12 and abs(terms["V_hat"] - R.sum() / 28) < 1e-12

def test_sampling_follows_the_policy(a2c):
    log_pi = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    noise = torch.empty(200_000, 4).exponential_(generator=torch.Generator().manual_seed(0))
    frequency = a2c.sample(log_pi, noise).bincount(minlength=4) / 200_000
    assert (frequency - log_pi.exp()).abs().max() < 4 * math.sqrt(0.25 / 200_000)
    table = torch.tensor([[0.0, 2.0, 1.0]]).expand(2, 5, 3)  # the actions are on the last axis
    assert torch.equal(a2c.sample(table, torch.ones(2, 5, 3)), torch.ones(2, 5).long())

# update size over learning rate at steps 1, 100, 500, 2000 under a constant gradient (TensorFlow 1)
RMSPROP_TABLE = {1e-2: (0.010, 0.017, 0.12, 0.95), 1e-3: (0.0010, 0.0017, 0.012, 0.30),
                 1e-4: (1e-4, 1.7e-4, 1.2e-3, 0.032)}

@pytest.mark.parametrize("g, expected", RMSPROP_TABLE.items())
def test_rmsprop_is_tensorflows(g, expected):
    p = torch.nn.Parameter(torch.zeros(3))
    lr = 7e-4
    optimizer = a2c_proper.RMSpropTF([p], lr)
    sizes, mean_square = {}, 1.0
    for step in range(1, 2001):
        before, p.grad = p.detach().clone(), torch.full((3,), g)
        optimizer.step()
        mean_square += (g * g - mean_square) * (1 - 0.99)
        sizes[step] = ((before - p.detach()) / lr)[0].item()
        assert abs(sizes[step] - g / math.sqrt(mean_square + 1e-5)) < 1e-10
    for step, size in zip((1, 100, 500, 2000), expected):
        assert abs(sizes[step] / size - 1) < 0.06  # the table has two digits

def test_network_initialization_and_shapes():
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net = a2c_proper.ActorCritic(6)
    layers = [m for m in net.modules() if hasattr(m, "weight")]
    assert [tuple(m.weight.shape) for m in layers] == [
        (32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512), (1, 512)]
    for m in layers:
        w = m.weight.detach().flatten(1)
        gain = 1.0 if m in (net.pi, net.V) else math.sqrt(2)
        assert torch.allclose(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-4)
        assert not m.bias.any()
    obs = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    log_pi, V = net(obs)
    assert log_pi.shape == (2, 3, 6) and V.shape == (2, 3)
    h = net.trunk(obs[1, 2:].float() / 255)
    assert torch.allclose(V[1, 2], net.V(h).squeeze(), atol=1e-5)
    assert torch.allclose(log_pi[1, 2].exp(), net.pi(h)[0].softmax(-1), atol=1e-5)

def test_a_time_limit_pays_the_value_of_the_last_observation_with_the_reward(a2c, tmp_path,
                                                                             monkeypatch):
    """In the first 30 steps of Pong nobody scores: no other reward is there."""
    torch.set_default_dtype(torch.float32)
    nets, paid, cuts = [], [], 0
    build, recv, losses = a2c.ActorCritic.__init__, a2c.Atari.recv, a2c.losses

    def received(self):
        *step, last = recv(self)
        if last is not None:
            paid.append(0.99 * nets[0](last)[1].detach())
        return *step, last

    def watched(log_pi, V, a, r, done, *rest):
        nonlocal cuts
        assert torch.equal(r != 0, done > 0) and not r.requires_grad
        assert not paid or torch.equal(r[done > 0], torch.cat(paid))
        paid.clear()
        cuts += done.sum()
        return losses(log_pi, V, a, r, done, *rest)

    monkeypatch.setattr(a2c.ActorCritic, "__init__", lambda self, n: nets.append(self) or build(
        self, n))
    monkeypatch.setattr(a2c.Atari, "recv", received)
    monkeypatch.setattr(a2c, "losses", watched)
    a2c.train(tiny(a2c, tmp_path, env_id="ALE/Pong-v5", max_episode_frames=120))
    assert cuts == 2 * 6
