"""Where an update of a2c_proper.py spends its time: milliseconds, median of 40 after 5 to warm up.

    python benchmarks/profile_a2c.py [THREADS]
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a2c_proper as script  # noqa: E402

T, N, A = 5, 16, 6


def main():
    """Prints a row of a Markdown table for each part of an iteration of train(), emulator apart."""
    if sys.argv[1:]:
        torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    net = script.ActorCritic(A).to(memory_format=torch.channels_last)
    optimizer = script.RMSpropTF(net.parameters(), torch.tensor(7e-4))
    obs = torch.randint(0, 256, (T + 1, N, *script.OBS_SHAPE), dtype=torch.uint8)
    zeros, seconds = torch.zeros(T, N), {}
    rollout = script.Rollout(obs, zeros.long(), zeros, zeros, zeros, zeros)

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def act():
        with torch.no_grad():
            for t in range(T):
                script.sample(net(obs[t])[0], torch.zeros(N, A))

    def bootstrap():
        with torch.no_grad():
            return net(obs[T])[1]

    def update():
        timed(f"acting, {T} x {N}", act)
        V_n = timed("V(s_{t+n})", bootstrap)
        log_pi, V = timed(f"forward, {T * N}", lambda: net(obs[:T]))
        L, _ = timed("losses", lambda: script.losses(log_pi, V, rollout, V_n, torch.zeros(A),
                                                     0.01, 0.99, 0.5))
        optimizer.zero_grad()
        timed("backward", L.backward)
        timed("clip", lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5))
        timed("RMSProp", lambda: optimizer.step(torch.tensor(True)))

    for _ in range(45):
        update()
    print(f"| part | ms, {torch.get_num_threads()} threads |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {1000 * statistics.median(values[5:]):.1f} |")


if __name__ == "__main__":
    main()
