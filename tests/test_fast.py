"""The fast path gives the numbers of the plain one, repeated from a record as by a CUDA graph."""
import contextlib

import pytest
import torch

import recorded
from test_run import checkpoint, equal, rows, tiny

ARMS = [("a2c_naive", {}), ("a2c_proper", dict(regularizer="kl")),
        ("soft_dqn", {}), ("soft_dqn", dict(backup="hard", n_step=3)),
        ("soft_dqn", dict(backup="soft-kl", n_step=2, exploration="boltzmann", loss="square")),
        ("pgql_equiv", dict(update="pg", compare_every=3)),
        ("pgql_equiv", dict(parameterization="q", vf_coef="theory", compare_every=0)),
        ("natural_pg_damped", {}), ("natural_pg_damped", dict(solver="cg", value="shared"))]


@pytest.fixture(params=ARMS, ids=lambda arm: "-".join((arm[0], *map(str, arm[1].values()))))
def arm(request):
    import importlib
    return importlib.import_module(request.param[0]), request.param[1]


def test_a_captured_run_equals_one_that_is_not(arm, tmp_path, monkeypatch):
    """Over periodic saves, evaluations and games cut by the time limit."""
    script, flags = arm
    flags = dict(flags, total_timesteps=220, eval_every=130, eval_episodes=2, checkpoint_every=100)
    plain, eager = (script.train(tiny(script, tmp_path / str(fast), fast=fast, **flags))["folder"]
                    for fast in (False, True))
    replays = []
    monkeypatch.setattr(script, "captured", recorded.captured(replays))
    graphs = script.train(tiny(script, tmp_path / "graphs", **flags))["folder"]
    assert len(replays) > 40
    pairs = [(eager, graphs)]
    if script.__name__ in ("soft_dqn", "natural_pg_damped"):  # the same operations
        pairs += [(plain, eager)]
    else:  # a pass over two pictures may round otherwise than one over ten
        for name, value in rows(plain)[0].items():
            assert float(rows(eager)[0][name]) == pytest.approx(
                float(value), 1e-3, 1e-6, nan_ok=True)
    for one, other in pairs:
        for log in ("metrics.csv", "eval.csv"):
            assert rows(one, log) == rows(other, log) and len(rows(one, log)) > 1
        a, b = (checkpoint(script, folder) for folder in (one, other))
        differ = {"args", "wall", "path", "logs"}
        assert all(equal(a[name], b[name]) for name in a.keys() - differ)


def test_a_recording_goes_wrong_where_a_graph_would():
    x, size = torch.zeros(3), [1.0]
    args = type("Args", (), dict(fast=True))

    def baked():
        return x.add_(size[0])

    fn = recorded.captured([])(baked, args, None)
    fn()
    size[0] = 5.0
    assert torch.equal(fn(), torch.full((3,), x[0])) and x[0] == 4
    y = [torch.ones(3)]
    fn = recorded.captured([])(lambda: 2 * y[0], args, None)
    assert torch.equal(fn(), torch.full((3,), 2.0))
    y[0] = torch.zeros(3)  # a new tensor, which a graph does not see
    assert torch.equal(fn(), torch.full((3,), 2.0))
    for looks in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()),
                  lambda: x.nonzero(), lambda: torch.tensor(1.0),
                  lambda: x.__setitem__(x > 0, 1.0)):
        with pytest.raises(RuntimeError, match="cannot be captured"):
            recorded.captured([])(looks, args, None)()


def test_networks_and_optimizers_are_put_back_after_the_warming_up(shared):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    optimizer = shared.RMSpropTF(net.parameters(), torch.tensor(0.1))
    state = shared.tensors_of([net.state_dict(), optimizer.state_dict()])
    assert {x.data_ptr() for x in state} >= {
        *(p.data_ptr() for p in net.parameters()), optimizer.param_groups[0]["lr"].data_ptr(),
        *(x.data_ptr() for s in optimizer.state.values() for x in s.values())}
    assert len(state) == 5


def test_adams_state_is_found_too():
    import soft_dqn
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = soft_dqn.AdamTF([p], 0.1)
    found = {x.data_ptr() for x in soft_dqn.tensors_of(optimizer.state_dict())}
    assert found == {x.data_ptr() for x in (*optimizer.state[p].values(),
                                            *(optimizer.param_groups[0][x] for x in ("t", "lr")))}


@pytest.mark.parametrize("kind", ["ActorCritic", "SoftQ"])
def test_activations_kept_while_acting_give_the_gradient_of_a_second_pass(kind):
    import pgql_equiv
    torch.manual_seed(3)
    T, N, A = 3, 4, 6
    net = (pgql_equiv.ActorCritic(A) if kind == "ActorCritic" else
           pgql_equiv.SoftQ(A, torch.zeros(A), 0.5)).to(memory_format=torch.channels_last)
    for p in net.parameters():
        p.data.add_(0.01 * torch.randn_like(p))
    obs = torch.randint(0, 256, (T, N, 4, 84, 84), dtype=torch.uint8)
    kept, w = [None] * T, torch.randn(T, N, A)
    with torch.no_grad():
        acted = [net(obs[t], kept, t) for t in range(T)]
    gradients = []
    for log_pi, V in (net(obs), net(torch.zeros_like(obs), kept)):  # the pictures are not looked at
        for got, of in ((log_pi, 0), (V, 1)):
            torch.testing.assert_close(got, torch.stack([x[of] for x in acted]))
        L = (w * log_pi).mean() + V.square().mean()
        gradients.append(torch.autograd.grad(L, list(net.parameters())))
    for again, recalled in zip(*gradients):
        assert again.abs().max() > 0
        torch.testing.assert_close(recalled, again, rtol=1e-4, atol=1e-6 * again.abs().max().item())


@pytest.mark.parametrize("fast", [True, False])
def test_an_update_makes_no_pass_that_acting_made(a2c, tmp_path, fast):
    passes = []

    class Counting(a2c.ActorCritic):
        def __init__(self, n_actions):
            super().__init__(n_actions)
            self.trunk[0].register_forward_hook(lambda _, x, y: passes.append(len(x[0])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(a2c, "ActorCritic", Counting)
        a2c.train(tiny(a2c, tmp_path, total_timesteps=10, fast=fast))
    assert passes == [2] * 5 + [2] + ([] if fast else [10])  # n = 5, two environments


def test_pictures_are_scaled_and_channels_last(script):
    """As .to(float32, channels_last) / 255, bit for bit, on any leading shape."""
    seen = []
    first = torch.nn.Conv2d(4, 2, 8, stride=4)
    with contextlib.suppress(StopIteration), pytest.MonkeyPatch.context() as patch:
        def look(x):
            seen.append(x)
            raise StopIteration
        patch.setattr(first, "forward", look)
        name, trunk = (("QNetwork", "Q") if script.__name__ == "soft_dqn" else
                       ("ActorCritic", "trunk"))
        net = getattr(script, name)(3)
        getattr(net, trunk)[0] = first
        obs = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
        net(obs)
    expected = obs.flatten(0, 1).to(torch.float32, memory_format=torch.channels_last) / 255
    assert torch.equal(seen[0], expected) and seen[0].stride() == expected.stride()


def test_a_tensor_is_filled_from_host_arrays(shared):
    x = torch.zeros(2, 3, dtype=torch.uint8)
    sender = shared.Pinned(x)
    sender.send(1, torch.tensor([4, 5, 6], dtype=torch.uint8).numpy())
    assert x.tolist() == [[0, 0, 0], [4, 5, 6]]
