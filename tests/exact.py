"""Small random problems on which every expectation is a finite sum. Nothing here is under test."""
import itertools

import torch

class MDP:
    """S states, A actions; after a step that ends the game the next state is the next game's first.

    p (S, A, S) transition probabilities, r (S, A) rewards, ends (S, A) 1 where the game ends,
    log_pi_bar (S, A) a reference policy that is not uniform, start (S,) first-state probabilities.
    """
    def __init__(self, seed, S=3, A=2, endings=True):
        self.S, self.A = S, A
        g = torch.Generator().manual_seed(seed)
        self.p = torch.rand(S, A, S, generator=g).softmax(-1)
        self.r = torch.randn(S, A, generator=g)
        self.ends = (torch.rand(S, A, generator=g) < 0.3).to(self.r.dtype) * endings
        self.log_pi_bar = torch.randn(S, A, generator=g).log_softmax(-1)
        self.start = torch.randn(S, generator=g).softmax(-1)

    def trajectories(self, n, policy):
        """Yields (probability, states (n+1,), actions (n,)) of every path of n steps."""
        steps = range(self.S), range(self.A)
        for path in itertools.product(range(self.S), *(steps[::-1] * n)):
            states, actions = path[0::2], path[1::2]
            probability = self.start[states[0]]
            for s, a, s_next in zip(states, actions, states[1:]):
                probability = probability * policy[s, a] * self.p[s, a, s_next]
            yield probability, torch.tensor(states), torch.tensor(actions)

class Model:
    """log pi (S, A) and V (S,) of a small network with a shared trunk, on one-hot states."""
    def __init__(self, mdp, seed, hidden=5):
        g = torch.Generator().manual_seed(seed)
        shapes = (mdp.S, hidden), (hidden, mdp.A), (hidden, 1)
        self.weights = [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]

    def __call__(self):
        trunk, pi, V = self.weights
        h = trunk.tanh()
        return (h @ pi).log_softmax(-1), (h @ V).squeeze(-1)

    def gradient(self, scalar):
        """The gradient of a scalar as one flat vector, zero where there is none."""
        grads = torch.autograd.grad(scalar, self.weights, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(w) if g is None else g).flatten()
                          for w, g in zip(self.weights, grads)])
