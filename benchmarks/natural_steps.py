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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import natural_pg_damped as npg  # noqa: E402

RESULTS = ROOT / "results" / "natural_steps"
DAMPINGS, STEPS = (0.01, 0.1, 1.0), (0.003, 0.01, 0.03, 0.1)
EPS, PASSES = (1e-4, 3e-4, 1e-3, 3e-3), 16


def batch_of(net, args):
    """The Batch of one rollout, with targets as train() makes them, after 200 steps of play."""
    envs, T, N = npg.Atari(args, args.num_envs), args.num_steps, args.num_envs
    generator = torch.Generator().manual_seed(0)
    s = envs.reset(npg.seeds(0, 0, "evaluation", N))
    obs, a, rest = [torch.from_numpy(s.copy())], [], []
    for _ in range(200 + T):
        with torch.no_grad():
            noise = npg.gumbel_noise((N, envs.n_actions), generator)
            a.append(npg.sample(net(obs[-1]), noise))
        s, reward, terminated, truncated, _ = envs.step(a[-1].numpy())
        rest.append((np.sign(reward), terminated, truncated))
        obs.append(torch.from_numpy(s.copy()))
    obs, a = torch.stack(obs[-T - 1:]), torch.stack(a[-T:])
    r, terminated, truncated = torch.tensor(np.array(rest[-T:], np.float32)).transpose(0, 1)
    with torch.no_grad():
        log_pi, V = net(obs[:T]), net.V(obs)
    KL = npg.kl_divergence(log_pi, 0.0)
    delta = npg.td_errors(r, KL, terminated, truncated, V, torch.zeros(T, N), args.tau, args.gamma)
    Delta = npg.advantages(delta, torch.maximum(terminated, truncated), args.gamma, args.n_step)
    log_ratio = npg.at(log_pi, a)
    rows = (obs[:T], a, log_pi, log_ratio, V[:T], V[:T] + Delta,
            npg.q_step(Delta, log_ratio, KL, args.tau))
    return npg.Batch(*(x.flatten(0, 1) for x in rows))


def main(folder):
    torch.set_num_threads(1)
    saved = npg.read_checkpoint(folder)
    args = npg.Args(**saved["args"])
    net = npg.PolicyAndValue(saved["net"]["actor.pi.bias"].numel(), args.value)
    net.load_state_dict(saved["net"])
    net.to(memory_format=torch.channels_last)
    old, rows = batch_of(net, args), []
    theta, tau = npg.flat(net.of("pi")), args.tau
    for damping in DAMPINGS:
        solution, seconds = npg.solve(net, old, dataclasses.replace(args, damping=damping))
        for step in STEPS:
            npg.move(net.of("pi"), step * solution.x)
            with torch.no_grad():
                kl = npg.kl_moved(old.log_pi, net(old.s))
            rows.append(dict(solver="cg", damping=damping, eps=step * tau, kl_moved=float(kl),
                             kl_quadratic=float(npg.quadratic_kl(step, 1.0, solution.xFx)),
                             cg_residual=float(solution.residual), cg_seconds=seconds))
            npg.move(net.of("pi"), theta - npg.flat(net.of("pi")))
    solution, _ = npg.solve(net, old, args)
    for eps in EPS:
        adam = npg.adam_of(net.of("pi"), args.learning_rate, torch.device("cpu"))
        target = npg.log_pi_target(npg.at(old.log_pi, old.a), old.A, eps, tau)
        generator = torch.Generator().manual_seed(0)
        for k in range(PASSES):
            for i in npg.minibatches(1, len(old.a), args.minibatch_size, generator):
                L = npg.regression_loss(npg.at(net(old.s[i]), old.a[i]), target[i]).mean()
                npg.descend(L, adam, args)
            if k + 1 in (1, 2, 4, 8, 16):
                with torch.no_grad():
                    new, d = net(old.s), npg.flat(net.of("pi")) - theta
                of_eps = torch.tensor(eps)
                found = npg.measure(solution, d, d, old.log_pi, new, new, of_eps, tau)
                found |= npg.statistics(old, new, torch.zeros(new.shape[-1]), of_eps, tau)
                names = "residual", "cosine", "cosine_fisher", "norm_ratio", "kl_quadratic"
                rows.append(dict(solver="regression", eps=eps, passes=k + 1,
                                 kl_moved=float(found["kl_measured"]),
                                 **{name: float(found[name]) for name in names}))
        npg.move(net.of("pi"), theta - npg.flat(net.of("pi")))
    RESULTS.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(RESULTS / "steps.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)
    about = npg.provenance(torch.device("cpu"), args)
    (RESULTS / "provenance.json").write_text(json.dumps(about, indent=1) + "\n")
    print((RESULTS / "steps.csv").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
