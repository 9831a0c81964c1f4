"""Section 7, related work: relations of advantages, rewards and optimal policies along paths."""
import torch

from equations.base import equation, generator
from exact import MDP

TAU, GAMMA = 0.3, 0.9

def random_policy(mdp, seed):
    """log pi (S, A)."""
    return torch.randn(mdp.S, mdp.A, generator=generator(seed + 9)).log_softmax(-1)

def values(mdp, log_pi, tau, next_state=None):
    """V_pi (S,) and Q_pi (S, A) by a linear solve; next_state (S, A) where it is deterministic."""
    pi, alive = log_pi.exp(), 1 - mdp.ends
    p = mdp.p if next_state is None else torch.eye(mdp.S)[next_state]
    regular = tau * (pi * (log_pi - mdp.log_pi_bar)).sum(-1)
    P = torch.einsum("sa,sax->sx", pi * alive, p)
    V = torch.linalg.solve(torch.eye(mdp.S) - GAMMA * P, (pi * mdp.r).sum(-1) - regular)
    return V, mdp.r + GAMMA * alive * (p @ V)

def optimum(mdp, next_state=None):
    """Q* (S, A), V* (S,), log pi* (S, A) by iterating the soft Bellman operator, Eq. 39."""
    p = mdp.p if next_state is None else torch.eye(mdp.S)[next_state]
    V = torch.zeros(mdp.S)
    for _ in range(600):
        Q = mdp.r + GAMMA * (1 - mdp.ends) * (p @ V)
        V = TAU * (mdp.log_pi_bar + Q / TAU).logsumexp(-1)
    return Q, V, mdp.log_pi_bar + (Q - V[:, None]) / TAU

def path(mdp, seed, n=6):
    """A deterministic map (S, A) -> state, and states (n+1,) and any actions (n,) of one path."""
    g = generator(seed + 20)
    next_state = torch.randint(mdp.S, (mdp.S, mdp.A), generator=g)
    actions = torch.randint(mdp.A, (n,), generator=g)
    states = [int(torch.randint(mdp.S, (), generator=g))]
    for a in actions:
        states.append(int(next_state[states[-1], a]))
    return next_state, states, actions.tolist()

@equation(87, margin=0.1)
def q_from_policy_and_value(seed):
    """PGQ: Q = V + tau (log pi + S) has the mean V under pi, as its next sentence says.

    Printed with tau S inside the bracket, which already has a tau, it has not.
    """
    mdp = MDP(seed)
    log_pi, V = random_policy(mdp, seed), torch.randn(mdp.S, generator=generator(seed))
    pi = log_pi.exp()
    S = -(pi * log_pi).sum(-1, keepdim=True)
    excess, printed = ((pi * (V[:, None] + TAU * (log_pi + x))).sum(-1) - V for x in (S, TAU * S))
    return excess, printed

@equation(88)
def advantages_along_a_path(seed):
    """Sum of gamma^t A_pi against rewards and V at both ends; no chance in p, any actions."""
    mdp = MDP(seed, endings=False)
    next_state, s, a = path(mdp, seed)
    V, Q = values(mdp, random_policy(mdp, seed), 0.0, next_state)
    left = sum(GAMMA**t * (Q[s[t], a[t]] - V[s[t]]) for t in range(len(a)))
    rewards = sum(GAMMA**t * mdp.r[s[t], a[t]] for t in range(len(a)))
    right = rewards + GAMMA ** len(a) * V[s[-1]] - V[s[0]]
    middle = sum(GAMMA**t * (mdp.r[s[t], a[t]] + GAMMA * V[s[t + 1]] - V[s[t]])
                 for t in range(len(a)))
    assert abs(left - (rewards - V[s[0]])) > 1e-2, "without the last value"
    return [left - right, middle - right]

@equation(89)
def optimal_policy_and_advantage(seed):
    """tau (log pi* - log pi_bar) = Q* - V*, with V* as the regularized value of pi* by a solve."""
    mdp = MDP(seed)
    _, _, log_pi = optimum(mdp)
    V, Q = values(mdp, log_pi, TAU)
    other = random_policy(mdp, seed)
    V_other, Q_other = values(mdp, other, TAU)
    off = TAU * (other - mdp.log_pi_bar) - (Q_other - V_other[:, None])
    assert off.abs().max() > 0.1, "at the optimum only"
    return TAU * (log_pi - mdp.log_pi_bar) - (Q - V[:, None])

@equation(90)
def path_consistency(seed):
    """Sum of gamma^t tau log ratio along any actions, at the optimum of deterministic dynamics."""
    mdp = MDP(seed, endings=False)
    next_state, s, a = path(mdp, seed)
    _, V, log_pi = optimum(mdp, next_state)

    def error(log_pi, V):
        steps = range(len(a))
        ratio = sum(GAMMA**t * TAU * (log_pi - mdp.log_pi_bar)[s[t], a[t]] for t in steps)
        rewards = sum(GAMMA**t * mdp.r[s[t], a[t]] for t in steps)
        return ratio - (rewards + GAMMA ** len(a) * V[s[-1]] - V[s[0]])

    other = random_policy(mdp, seed)
    assert abs(error(other, values(mdp, other, TAU, next_state)[0])) > 0.1, "at the optimum only"
    return error(log_pi, V)
