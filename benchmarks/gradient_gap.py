"""How far apart the two gradients of pgql_equiv.py are for a sample, as a function of tau.

    python benchmarks/gradient_gap.py train    seven short runs, one for each tau, in runs/gap;
                                               two of these at once share the work
    python benchmarks/gradient_gap.py          measures; writes results/gap (needs the extra "plot")
    python benchmarks/gradient_gap.py draw     only its picture, again

The gap between the gradients of ql_loss and pg_loss for a sample is of order tau and averages to
nothing over actions. Its size is given relative to the policy gradient: the root mean square over
single samples, and the norm for means over batches. On small random MDPs, all pairs (s, a) in the
proportion of the policy; on Krull, 4 batches of 80 samples each, played by a network that was
trained with the same tau.
"""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "paper")]
import style  # noqa: E402

import pgql_equiv  # noqa: E402
from exact import MDP, Model  # noqa: E402

TAUS = 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001
GAME, STEPS, SEEDS, BATCHES, C, GAMMA = "ALE/Krull-v5", 50_000, 5, 4, 0.5, 0.99
RUNS, RESULTS = ROOT / "runs" / "gap", ROOT / "results" / "gap"

def train():
    """Runs what is missing, or not begun by another process, one after the other, on one thread."""
    for tau in TAUS:
        if not (RUNS / f"tau{tau:g}").exists():
            (RUNS / f"tau{tau:g}").mkdir(parents=True)
            folder = str((RUNS / f"tau{tau:g}").relative_to(ROOT))
            command = ["pgql_equiv.py", "--tau", f"{tau:g}", "--env-id", GAME, "--total-timesteps",
                       str(STEPS), "--threads", "1", "--runs-dir", folder]
            print("+", *command, flush=True)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)

def gradients(loss, x, tau, parameters):
    """The gradient of a loss (T, N) for each sample, (T N, P), in float64."""
    rows = []
    for term in loss(x, tau, C).flatten():
        g = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(p) if part is None else part).flatten()
                               for part, p in zip(g, parameters)]).double())
    return torch.stack(rows)

def relative(gap, pg, weights):
    """Root mean square of the gap over that of the policy gradient, (samples, P) each."""
    return float(((weights @ gap.square().sum(-1)) / (weights @ pg.square().sum(-1))).sqrt())

def on_mdp(tau, seed):
    """All (s, a) of a random MDP; V of a random network, one-step returns."""
    mdp = MDP(seed, S=6, A=4)
    model = Model(mdp, seed + 10)
    log_pi, V = model()
    s, a = (x.flatten() for x in torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij"))
    V_n = (mdp.p[s, a] @ V).detach()
    x = pgql_equiv.samples(log_pi[s][None], V[s][None], a[None], mdp.r[s, a][None],
                           mdp.ends[s, a][None], V_n, 0.0, tau, GAMMA)
    pg, gap = (gradients(f, x, tau, model.weights)
               for f in (pgql_equiv.pg_loss, pgql_equiv.gap_loss))
    weights = log_pi[s, a].exp().detach() / 6
    return relative(gap, pg, weights), float((weights @ gap).norm() / (weights @ pg).norm())

def on_krull(tau):
    """Batches of 5 steps of 16 environments by the network that was trained with this tau."""
    path, = (RUNS / f"tau{tau:g}").glob("*/pgql_equiv.pt")
    saved = torch.load(path, "cpu", weights_only=True)
    args = pgql_equiv.Args(**(saved["args"] | dict(device="cpu")))
    envs, T, N = pgql_equiv.Atari(args, args.num_envs), args.num_steps, args.num_envs
    net = pgql_equiv.ActorCritic(envs.n_actions)
    net.load_state_dict(saved["net"])
    parameters, samples, batches = list(net.parameters()), [], []
    torch.manual_seed(0)
    s = envs.reset(np.random.SeedSequence([0, *b"gap"]).generate_state(N) >> 1)
    for k in range(40 * BATCHES):  # every 40th batch is measured, some 13 seconds of play apart
        steps = []
        for noise in torch.empty(T, N, envs.n_actions).exponential_():
            with torch.no_grad():
                obs, a = s, pgql_equiv.sample(net(s)[0], noise)
            envs.send(a)
            s, r, terminated, truncated, _ = envs.recv()  # far from the time limit
            steps.append((obs, a, r.sign(), (terminated | truncated).float()))
        if k % 40 < 39:
            continue
        obs, *rest = map(torch.stack, zip(*steps))
        with torch.no_grad():
            V_n = net(s)[1]
        x = pgql_equiv.samples(*net(obs), *rest, V_n, 0.0, tau, GAMMA)
        pg, gap = (gradients(f, x, tau, parameters)
                   for f in (pgql_equiv.pg_loss, pgql_equiv.gap_loss))
        samples.append([gap.square().sum(-1).mean(), pg.square().sum(-1).mean()])
        batches.append([gap.mean(0).norm().square(), pg.mean(0).norm().square()])
    return (math.sqrt(gap / pg) for gap, pg in np.mean([samples, batches], axis=1))

def measure():
    """Writes results/gap/gap.csv, provenance.json and gap.png."""
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = []
    for tau in TAUS:
        torch.set_default_dtype(torch.float64)
        mdps = np.array([on_mdp(tau, seed) for seed in range(SEEDS)])
        torch.set_default_dtype(torch.float32)
        sample, batch = on_krull(tau)
        rows.append([tau, *mdps[:, 0].tolist(), max(mdps[:, 1]), sample, batch])
        print(*(f"{x:.3g}" for x in rows[-1]), flush=True)
    header = ["tau", *(f"mdp{i}_sample" for i in range(SEEDS)), "mdp_expectation", "krull_sample",
              "krull_batch80"]
    with open(RESULTS / "gap.csv", "w", newline="") as f:
        csv.writer(f).writerows([header, *([f"{x:.6g}" for x in row] for row in rows)])
    (RESULTS / "provenance.json").write_text(json.dumps(provenance(), indent=1) + "\n")
    draw()

def draw():
    """results/gap/gap.png from gap.csv."""
    figure, ((ax,),) = style.panels(1, 1, 4)
    rows = np.loadtxt(RESULTS / "gap.csv", delimiter=",", skiprows=1)
    tau, *mdps, _, sample, batch = rows[rows[:, 0].argsort()].T
    for i, column in enumerate(mdps):
        ax.plot(tau, column, ":", color=style.GRAY, lw=1,
                label="_" if i else f"a sample, {SEEDS} random MDPs")
    for k, (column, label) in enumerate(((sample, "a sample, Krull"),
                                         (batch, "mean of 80 samples, Krull"))):
        ax.plot(tau, column, style.MARKERS[k], color=style.STYLES[k][0], ls=style.STYLES[k][1],
                label=label)
    style.level(ax, 1, "the policy gradient itself")
    ax.axvline(0.01, color="0.8", lw=1, zorder=0)
    ax.text(0.0105, 0.02, "the paper's tau", color=style.GRAY, transform=ax.get_xaxis_transform())
    ax.set(title="Gradient of soft Q-learning minus policy gradient", xscale="log", yscale="log",
           xlabel="tau", ylabel="norm, relative to the policy gradient")
    style.save(figure, RESULTS / "gap.png", width=18)

if __name__ == "__main__":
    commands = {("train",): train, (): measure, ("draw",): draw}
    commands.get(tuple(sys.argv[1:]), lambda: sys.exit(__doc__))()
