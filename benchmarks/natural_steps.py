"""Natural gradient steps on one batch of a trained network: damping, step size, KL moved.

    python benchmarks/natural_steps.py runs/krull/natural/seed1/...    a run of natural_pg_damped.py

Plays one rollout with the saved network, solves for the natural gradient x at several dampings, and
takes steps eps/tau x of several sizes: the KL that the policy moves beside what was predicted. Then
fits the regression itself, by passes of Adam from a fresh state, at several eps. Writes
results/natural_steps.
"""
import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import natural_pg_damped as npg  # noqa: E402

RESULTS = ROOT / "results" / "natural_steps"
DAMPINGS, STEPS = (0.01, 0.1, 1.0), (0.003, 0.01, 0.03, 0.1)
EPS, PASSES = (1e-4, 3e-4, 1e-3, 3e-3), (1, 2, 4, 8, 16)

def networks(folder):
    """The flags of a run and its two networks, on the CPU."""
    saved = torch.load(Path(folder, npg.CHECKPOINT), "cpu", weights_only=True)
    args = npg.Args(**(saved["args"] | dict(device="cpu")))
    nets = [npg.Network(len(saved[name]["head.bias"])) for name in ("pi", "V")]
    for net, name in zip(nets, ("pi", "V")):
        net.load_state_dict(saved[name])
        net.to(memory_format=torch.channels_last)
    return args, *nets

@torch.no_grad()
def batch_of(pi, V, args):
    """obs, a, log_pi and A_t, (B, ...), of one rollout as train() makes them, after 200 steps."""
    envs, T, N = npg.Atari(args, args.num_envs), args.num_steps, args.num_envs
    torch.manual_seed(0)
    s, steps = envs.reset(np.random.SeedSequence([0, *b"steps"]).generate_state(N) >> 1), []
    for noise in torch.empty(200 + T, N, envs.n_actions).exponential_():
        obs, log_pi = s, pi(s)
        a = npg.sample(log_pi, noise)
        envs.send(a)
        s, r, terminated, truncated, _ = envs.recv()  # far from the time limit
        steps = steps[1 - T:] + [(obs, a, log_pi, r.sign(), (terminated | truncated).float())]
    obs, a, log_pi, r, done = map(torch.stack, zip(*steps))
    KL = npg.kl_divergence(log_pi, 0.0)
    delta = npg.td_errors(r, KL, done, torch.cat([V(obs), V(s[None])]), args.tau, args.gamma)
    Delta = npg.advantages(delta, done, args.gamma, args.n_step)
    A_t = npg.q_step(Delta, npg.at(log_pi, a), KL, args.tau)
    return [x.flatten(0, 1) for x in (obs, a, log_pi, A_t)]

def main(folder):
    torch.set_num_threads(1)
    args, pi, V = networks(folder)
    obs, a, log_pi, A_t = batch_of(pi, V, args)
    theta, tau, rows = npg.flat(pi), args.tau, []

    def back():  # to theta
        npg.move(pi, theta - npg.flat(pi))

    def q_loss(log_pi, eps):  # V_old and log pi_bar = 0 are in both Q and left out
        return npg.damped_q_loss(0.0, npg.at(log_pi, a), 0.0, log_pi_a, A_t, eps, tau).mean()

    log_pi_a = npg.at(log_pi, a)
    for damping in DAMPINGS:
        x, times, residual, seconds = npg.solve(pi, obs, a, A_t,
                                                dataclasses.replace(args, damping=damping))
        xFx = npg.all_action_fisher(log_pi, times(x), times(x))
        for step in STEPS:
            npg.move(pi, step * x)
            with torch.no_grad():
                moved = npg.mean_kl(log_pi, pi(obs))
            rows.append(dict(solver="cg", damping=damping, eps=step * tau, kl_moved=float(moved),
                             kl_quadratic=float(npg.quadratic_kl(step, 1.0, xFx)),
                             cg_residual=float(residual), cg_seconds=seconds))
            back()
    x, times, *_ = npg.solve(pi, obs, a, A_t, args)
    Jx = times(x)
    for eps in EPS:
        adam = torch.optim.Adam(pi.parameters(), args.learning_rate, eps=1e-5, fused=True)
        data = obs, a, npg.log_pi_target(log_pi_a, A_t, eps, tau)
        torch.manual_seed(0)
        for before, passes in zip((0, *PASSES), PASSES):
            npg.fit(lambda obs, a, target: npg.regression_loss(npg.at(pi(obs), a), target).mean(),
                    adam, data, passes - before, args)
            with torch.no_grad():
                new, d = pi(obs), npg.flat(pi) - theta
            Jd = times(d)
            dFx, dFd, xFx = (npg.all_action_fisher(log_pi, Jv, Jw)
                             for Jv, Jw in ((Jd, Jx), (Jd, Jd), (Jx, Jx)))
            found = dict(kl_moved=npg.mean_kl(log_pi, new), kl_quadratic=0.5 * dFd,
                         residual=q_loss(new, eps) / q_loss(log_pi, eps),
                         cosine=d @ x / (d.norm() * x.norm()),
                         cosine_fisher=dFx / (dFd * xFx).sqrt(),
                         norm_ratio=d.norm() / (eps / tau * x.norm()))
            rows.append(dict(solver="regression", eps=eps, passes=passes,
                             **{k: float(v) for k, v in found.items()}))
        back()
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(RESULTS / "steps.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)
    about = provenance(args=vars(args))
    (RESULTS / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")
    print((RESULTS / "steps.csv").read_text())

if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
