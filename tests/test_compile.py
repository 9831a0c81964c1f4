"""What --compile needs to be right on a GPU, as far as it shows without one.

Dynamo traces the two functions of each script as there, without a graph break, but what runs is
plain PyTorch. And as by CUDA graphs, what a compiled function returned is overwritten as soon as
one is called again: a script that still needs it must have cloned it.
"""
import pytest
import torch

from util import rows, trained

MORE = {"soft_dqn": dict(n_step=2), "pgql_equiv": dict(compare_every=3),
        "natural_pg_damped": dict(measure_every=2)}

class Overwriting:
    """In place of torch.compile."""
    def __init__(self):
        self.compile, self.results, self.calls, self.graphs = torch.compile, [], {}, 0

    def backend(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def __call__(self, function, fullgraph, mode):
        assert fullgraph and mode == "default", "on a CPU"
        compiled = self.compile(function, fullgraph=True, backend=self.backend)

        def call(*args):
            for x in self.results:  # memory of the graphs, which each call may use again
                x.fill_(float("nan") if x.is_floating_point() else -1)
            result = compiled(*args)
            self.results = [x.detach() for x in leaves(result)]
            self.calls[function.__name__] = self.calls.get(function.__name__, 0) + 1
            return result

        return call

def leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [x for part in (tree.values() if isinstance(tree, dict) else tree) for x in leaves(part)]

@pytest.fixture
def overwriting(monkeypatch):
    torch._dynamo.reset()
    fake = Overwriting()
    monkeypatch.setattr(torch, "compile", fake)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one graph for each function
        yield fake
    torch._dynamo.reset()

def test_a_compiled_run_equals_the_plain_one(four, tmp_path, overwriting, quick):
    """To rounding, over cut games, evaluations and saves, with two functions compiled once each."""
    flags = dict(MORE.get(four.__name__, {}), total_timesteps=100, log_every=20, eval_every=50,
                 eval_games=1, save_every=60, max_episode_frames=60)
    plain, compiled = (trained(four, tmp_path / str(on), compile=on, **flags)
                       for on in (False, True))
    assert overwriting.graphs == len(overwriting.calls) == 2
    assert min(overwriting.calls.values()) >= 5
    for log in ("metrics.csv", "eval.csv"):
        assert len(rows(plain, log)) == len(rows(compiled, log)) > 1
        for expected, row in zip(rows(plain, log), rows(compiled, log)):
            assert row.keys() == expected.keys()
            for name, x in row.items():
                assert float(x) == pytest.approx(float(expected[name]), 1e-4, 1e-6, nan_ok=True), (
                    row["step"], name)

def test_a_result_that_is_needed_later_would_be_noticed(overwriting):
    double = overwriting(lambda x: 2 * x, fullgraph=True, mode="default")
    first, cloned = double(torch.ones(2)), double(torch.ones(2)).clone()
    double(torch.ones(2))
    assert first.isnan().all() and cloned.tolist() == [2, 2]
