"""The paper's sections 4 and 6.3: the two gradients through the script's own functions, float64."""
import importlib
import inspect
import itertools
import math

import pytest
import torch

import a2c_proper
import equations.gradients
import pgql_equiv
from exact import MDP, Model
from pgql_equiv import gap_loss, pg_loss, ql_loss
from util import checkpoint, equal, rows, tiny, trained

TAU, GAMMA, C = 0.3, 0.9, 0.5
COMPARED = {*pgql_equiv.COMPARED}

class Separate(Model):
    """log pi and V of two networks that share nothing."""
    def __init__(self, mdp, seed):
        first, second = Model(mdp, seed), Model(mdp, seed + 1)
        self.models, self.weights = (first, second), first.weights + second.weights

    def __call__(self):
        return self.models[0]()[0], self.models[1]()[1]

class OneQ(equations.gradients.OneQ):
    """Section 4: log pi and V of one Q, by the script's own function."""
    def __call__(self):
        return pgql_equiv.policy_and_value(self.Q(), self.log_pi_bar, TAU)

MODELS = {"shared trunk": Model, "two networks": Separate, "one Q": OneQ}

def paths_from(mdp, start, n, policy):
    """Every path of n steps from a state as one batch: states (n+1, P), actions, probability."""
    steps = range(mdp.A), range(mdp.S)
    paths = torch.tensor(list(itertools.product([start], *(steps * n)))).T
    s, a = paths[0::2], paths[1::2]
    return s, a, (policy[s[:-1], a] * mdp.p[s[:-1], a, s[1:]]).prod(0)

def batch_of(mdp, model, s, a, log_pi_bar=None, tau=TAU):
    """The script's Samples of a batch of paths."""
    log_pi, V = model()
    here = s[:-1]
    log_pi_bar = mdp.log_pi_bar[here] if log_pi_bar is None else log_pi_bar
    return pgql_equiv.samples(log_pi[here], V[here], a, mdp.r[here, a], mdp.ends[here, a],
                              V[s[-1]].detach(), log_pi_bar, tau, GAMMA)

def random_batch(k, seed, T, N, kind=Model):
    """Random states and actions, endings among them: an MDP, a network, states and actions."""
    mdp = MDP(k)
    model, g = kind(mdp, k + 50), torch.Generator().manual_seed(seed)
    s = torch.randint(mdp.S, (T + 1, N), generator=g)
    return mdp, model, s, torch.randint(mdp.A, (T, N), generator=g)

def gradients(x, weight, model, c=C, losses=(pg_loss, ql_loss)):
    """The gradient of the weighted sum of each loss over the first samples of the paths."""
    return [model.gradient((weight * loss(x, TAU, c)[0]).sum()) for loss in losses]

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_expected_gradients_are_equal_in_each_state(double, kind, n):
    """Eq. 58-65: averaged over a_t ~ pi, exactly, for every s_t by itself; endings inside."""
    for seed in range(3):
        mdp = MDP(seed)
        model = MODELS[kind](mdp, seed + 50)
        for start in range(mdp.S):
            s, a, p = paths_from(mdp, start, n, model()[0].detach().exp())
            assert abs(p.sum() - 1) < 1e-12
            for c in (C, 1 / TAU):
                pg, ql = gradients(batch_of(mdp, model, s, a), p, model, c)
                assert pg.norm() > 1e-2 and (ql - pg).abs().max() < 1e-12

@pytest.mark.parametrize("kind", MODELS)
def test_expected_gradients_differ_where_actions_are_not_from_pi(double, kind):
    """So the test above can fail."""
    mdp = MDP(0)
    model = MODELS[kind](mdp, 50)
    s, a, p = paths_from(mdp, 1, 2, torch.full((mdp.S, mdp.A), 1 / mdp.A))
    pg, ql = gradients(batch_of(mdp, model, s, a), p, model)
    assert (ql - pg).abs().max() > 1e-2

def test_with_the_weight_that_section_6_prints_they_are_not_equal(double):
    """1/gamma in place of 1/tau; the misprints of Eq. 60, 63 and 64 have checks of their own."""
    mdp = MDP(1)
    model = Model(mdp, 51)
    s, a, p = paths_from(mdp, 2, 2, model()[0].detach().exp())
    x = batch_of(mdp, model, s, a)
    e = pgql_equiv.q_error(x, TAU).detach()
    pg, ql, printed = gradients(x, p, model, losses=(
        pg_loss, ql_loss, lambda x, tau, c: e * (tau / GAMMA * x.log_pi + c * x.V)))
    assert (pg - ql).abs().max() < 1e-12 and (printed - ql).abs().max() > 1e-3

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("n", [1, 3])
def test_gap_is_what_the_gradients_of_each_sample_differ_by(double, kind, n):
    """To 1e-12 for any actions, endings, horizons, rewards and targets, and it is not zero."""
    mdp, model, s, a = random_batch(3, n, n, 4, MODELS[kind])
    x = batch_of(mdp, model, s, a)
    other = x._replace(V_hat=x.V_hat + torch.tensor([3.0, -7.0, 0.5, 2.0]))
    assert torch.equal(gap_loss(x, TAU, C), gap_loss(other, TAU, C))
    for y in (x, other):
        losses = [f(y, TAU, C) for f in (pg_loss, ql_loss, gap_loss)]
        for t, i in itertools.product(range(n), range(4)):
            pg, ql, predicted = (model.gradient(loss[t, i]) for loss in losses)
            assert (ql - pg - predicted).abs().max() < 1e-12 and predicted.norm() > 1e-3

@pytest.mark.parametrize("name", ["n_step_returns", "kl_divergence", "sample"])
def test_what_a2c_proper_has_too_is_the_same(name):
    """Its tests against exact sums then hold here, and for natural_pg_damped.py."""
    others = map(importlib.import_module, ("pgql_equiv", "natural_pg_damped"))
    found = [inspect.getsource(getattr(x, name)) for x in others if hasattr(x, name)]
    assert set(found) == {inspect.getsource(getattr(a2c_proper, name))}
    assert len(found) == 2 or name == "n_step_returns"

def test_mixing_the_conventions_costs_tau_log_a_times_grad_v(double):
    """Q = V + tau log pi (entropy) with targets that charge the KL from uniform."""
    mdp = MDP(7)
    model = Model(mdp, 57)
    uniform = torch.tensor(-math.log(mdp.A))
    for start in range(mdp.S):
        s, a, p = paths_from(mdp, start, 2, model()[0].detach().exp())
        kl = batch_of(mdp, model, s, a, uniform)
        mixed = kl._replace(log_ratio=kl.log_pi)
        pg, ql, cost = gradients(kl, p, model, losses=(
            pg_loss, lambda _, *rest, mixed=mixed: ql_loss(mixed, *rest),
            lambda x, tau, c: -c * tau * math.log(2) * x.V))
        assert (ql - pg - cost).abs().max() < 1e-12 and cost.norm() > 1e-2
        for log_pi_bar in (uniform, torch.tensor(0.0)):  # either by itself is exact
            pg, ql = gradients(batch_of(mdp, model, s, a, log_pi_bar), p, model)
            assert (ql - pg).abs().max() < 1e-12

def test_neither_a_large_q_nor_a_bad_action_costs_digits_in_float32():
    """Q / tau = 1000 would be wrong in its fifth digit after the point.

    In units of tau the worst action is 1e7 away, where float32 knows no halves.
    """
    Q = 10 + 0.01 * torch.randn(200, 6)
    exact, log_pi = (pgql_equiv.policy_and_value(x, 0.0, 0.01)[0] for x in (Q.double(), Q))
    assert log_pi.dtype == torch.float32 and (log_pi - exact).abs().max() < 2e-6
    Q = torch.tensor([0.0, -0.5e-3, -1e4])
    log_pi, V = pgql_equiv.policy_and_value(Q, torch.zeros(3), 1e-3)
    assert abs(log_pi[0] - log_pi[1] - 0.5) < 1e-6
    assert abs(V - 1e-3 * math.log(1 + math.exp(-0.5))) < 1e-9

def test_compare_measures_the_gradients_themselves(double):
    """Against autograd of a tiny model."""
    mdp, model, s, a = random_batch(9, 0, 3, 6)
    x = batch_of(mdp, model, s, a)
    got = pgql_equiv.compare_gradients(x, TAU, C, model.weights)
    pg, ql = (model.gradient(f(x, TAU, C).mean()) for f in (pg_loss, ql_loss))
    assert got.keys() == COMPARED and got["gap_error"] < 1e-12
    assert abs(got["cosine"] - torch.cosine_similarity(pg, ql, dim=0)) < 1e-12
    assert abs(got["norm_ratio"] - ql.norm() / pg.norm()) < 1e-12
    assert abs(got["gap"] - (ql - pg).norm() / pg.norm()) < 1e-12
    assert abs(got["gap_predicted"] - got["gap"]) < 1e-12 and got["gap"] > 1e-3

def test_statistics_are_those_of_the_equations(double):
    """Eq. 84, 85 and 44, as means over a batch."""
    mdp, model, s, a = random_batch(10, 0, 3, 6)
    x, (log_pi, V) = batch_of(mdp, model, s, a), model()
    Delta = x.V_hat - V[s[:-1]]
    Q = V[s[:-1]] + TAU * (log_pi - mdp.log_pi_bar)[s[:-1], a]
    expected = dict(q_loss=0.5 * (Q - x.V_hat - TAU * x.KL) ** 2, value_loss=0.5 * Delta**2,
                    policy_loss=TAU * x.KL - log_pi[s[:-1], a] * Delta, KL=x.KL, V=V[s[:-1]],
                    V_hat=x.V_hat)
    got = pgql_equiv.statistics(x, TAU)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(got[name] - value.mean()) < 1e-12 and not got[name].requires_grad

# --- training ---
SHORT = dict(total_timesteps=80, num_envs=4, log_every=40, compare_every=1)  # 20 steps a batch

def test_policy_gradient_trains_the_very_network_of_a2c_proper(tmp_path):
    """Bit for bit, over lost lives, games cut by the time limit and comparisons of the gradients.

    Soft Q-learning learns differently from the same first batch.
    """
    flags = dict(SHORT, total_timesteps=200, log_every=20, regularizer="kl", tau=0.05,
                 max_episode_frames=120)
    pg, ql = (trained(pgql_equiv, tmp_path / update, update=update, **flags | dict(compare_every=k))
              for update, k in (("pg", 3), ("ql", 0)))
    del flags["compare_every"]
    proper = trained(a2c_proper, tmp_path / "proper", **flags)
    for name in ("net", "optimizer"):
        assert equal(checkpoint(pgql_equiv, pg)[name], checkpoint(a2c_proper, proper)[name])
    pg, ql, proper = map(rows, (pg, ql, proper))
    for mine, other in zip(pg, proper, strict=True):
        assert mine.keys() == other.keys() | COMPARED | {"q_loss", "KL"}
        for key in other.keys() - {"loss", "policy_loss", "entropy"}:
            assert mine[key] == other[key], key
        for key in ("loss", "policy_loss", "entropy"):
            assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6), key
    for key in ("policy_loss", "value_loss", "q_loss", "V", "V_hat", "entropy"):
        assert pg[0][key] == ql[0][key], key
    assert pg[0]["grad_norm"] != ql[0]["grad_norm"] and pg[-1]["V"] != ql[-1]["V"]
    assert [row["cosine"] != "nan" for row in pg] == [False, False, True] * 3 + [False]
    assert {row[key] for row in ql for key in COMPARED} == {"nan"}

@pytest.mark.parametrize("regularizer, constant", [("entropy", 0.0), ("kl", -math.log(4))])
@pytest.mark.parametrize("parameterization", ["dueling", "q"])
@pytest.mark.parametrize("update", ["pg", "ql"])
def test_live_proof_on_atari_data(tmp_path, monkeypatch, update, parameterization, regularizer,
                                  constant):
    """The measured gap is the predicted one to 1e-5 of the gradient in every batch of a run.

    The network and the samples are in the convention of the flag.
    """
    seen, bars, nets = [], set(), []
    compare, samples, build = (pgql_equiv.compare_gradients, pgql_equiv.samples,
                               pgql_equiv.SoftQ.__init__)

    def watched(x, *rest):
        assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        assert x.V.dtype == x.log_ratio.dtype == torch.float64
        seen.append(compare(x, *rest))
        return seen[-1]

    monkeypatch.setattr(pgql_equiv, "compare_gradients", watched)
    monkeypatch.setattr(pgql_equiv, "samples", lambda *x: bars.add(x[6]) or samples(*x))
    monkeypatch.setattr(pgql_equiv.SoftQ, "__init__", lambda self, *x: nets.append(x) or build(
        self, *x))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    logged = rows(trained(
        pgql_equiv, tmp_path, **SHORT, update=update, tau=0.1, parameterization=parameterization,
        regularizer=regularizer))
    assert len(seen) == 4 and len(logged) == 2 and torch.backends.cudnn.allow_tf32
    for batch in seen:
        assert batch["gap_error"] < 1e-5 and batch["gap"] > 1e-4
    for i, row in enumerate(logged):  # two batches a row
        for key in COMPARED:
            mean = (seen[2 * i][key] + seen[2 * i + 1][key]) / 2
            assert float(row[key]) == pytest.approx(mean.item(), rel=1e-5)
    assert bars == {constant} and nets == [(4, constant, 0.1)] * (parameterization == "q")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_live_proof_on_a_gpu(tmp_path):
    folder = trained(pgql_equiv, tmp_path, **SHORT, device="cuda")
    assert all(float(row["gap_error"]) < 1e-4 for row in rows(folder))

@pytest.mark.parametrize("parameterization", ["dueling", "q"])
def test_the_proof_is_not_spoilt_by_large_values(tmp_path, monkeypatch, parameterization):
    """Where V is 50 and Delta small, float32 would round Q - y to more than is allowed."""
    build = pgql_equiv.ActorCritic.__init__

    def large(self, n_actions):
        build(self, n_actions)
        (self.V if parameterization == "dueling" else self.pi).bias.data += 50

    monkeypatch.setattr(pgql_equiv.ActorCritic, "__init__", large)
    monkeypatch.setattr(pgql_equiv, "n_step_returns",
                        lambda r, *rest: 50 + 0.05 * torch.randn(r.shape))
    row, = rows(trained(pgql_equiv, tmp_path, **SHORT | dict(total_timesteps=20),
                        parameterization=parameterization))
    assert float(row["V"]) > 49 and float(row["gap_error"]) < 3e-6

def test_a_wrong_prediction_shows_in_the_log(tmp_path, monkeypatch):
    """With the sign of Eq. 64 as printed the error is not rounding."""
    monkeypatch.setattr(pgql_equiv, "gap_loss",
                        lambda x, tau, c: gap_loss(x, tau, c) + 2 * tau * x.KL)
    logged = rows(trained(pgql_equiv, tmp_path, **SHORT))
    assert logged and all(float(row["gap_error"]) > 1e-4 for row in logged)

@pytest.mark.parametrize("regularizer", ["entropy", "kl"])
def test_both_parameterizations_begin_with_the_same_policy(regularizer):
    """The Q head has gain tau, so the logits Q / tau are those of the policy head."""
    A, tau = 6, 0.01
    log_pi_bar = {"entropy": 0.0, "kl": -math.log(A)}[regularizer]
    obs = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    torch.manual_seed(3)
    dueling = pgql_equiv.ActorCritic(A)
    torch.manual_seed(3)
    one_q = pgql_equiv.SoftQ(A, log_pi_bar, tau)
    with torch.no_grad():
        (log_pi, _), (other, V) = dueling(obs), one_q(obs)
        Q = one_q.Q(one_q.trunk(obs / 255))
    entropies = [-(x.exp() * x).sum(-1) for x in (log_pi, other)]
    assert (log_pi - other).abs().max() < 1e-4 and log_pi.std() > 0.05
    assert (entropies[0] - entropies[1]).abs().max() < 1e-4
    assert (V[:, None] + tau * (other - log_pi_bar) - Q).abs().max() < 1e-5
    w = one_q.Q.weight.detach()
    assert torch.allclose(w @ w.T, tau**2 * torch.eye(A), atol=1e-7) and not one_q.Q.bias.any()
    assert {name.split(".")[0] for name in one_q.state_dict()} == {"trunk", "Q"}

def test_theory_trains_and_resumes_from_the_command_line(tmp_path, monkeypatch, command):
    """c is 1/tau in the loss that is descended; the flag survives a checkpoint."""
    seen = set()
    monkeypatch.setattr(pgql_equiv, "ql_loss",
                        lambda x, tau, c: seen.add((tau, c)) or ql_loss(x, tau, c))
    folder = trained(pgql_equiv, tmp_path, **SHORT, vf_coef="theory", tau=0.02)
    assert seen == {(0.02, 50.0)}
    assert command(pgql_equiv, "--resume", folder, "--total-timesteps", 120)[0] == 0
    assert seen == {(0.02, 50.0)} and rows(folder)[-1]["step"] == "120"
    assert all(math.isfinite(float(row["loss"])) for row in rows(folder))

@pytest.mark.parametrize("flags", [dict(vf_coef="theory"), dict(parameterization="q")])
def test_what_divides_by_a_tau_of_zero_is_refused(tmp_path, flags):
    with pytest.raises(ValueError, match="^--tau 0: --vf-coef theory and --parameterization q "):
        pgql_equiv.train(tiny(pgql_equiv, tmp_path, tau=0.0, **flags))
    trained(pgql_equiv, tmp_path, tau=0.0)
