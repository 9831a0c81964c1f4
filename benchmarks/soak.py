"""Does a long run stay as it is? Memory, open files, threads and speed of a training, over time.

    python benchmarks/soak.py --minutes 30 -- python a2c_proper.py --env-id ALE/Pong-v5 --threads 1
    python benchmarks/soak.py --report results/soak/*.csv

Starts a command, looks at its process every ten seconds, and stops it with SIGTERM after the time,
so that it saves and can be resumed. The samples go to --csv. The report fits a line to the resident
memory after the first third, when caches have filled, and compares the last third with the middle.
CPU seconds per step tell a slower program from a busier machine, which steps/s do not. Needs the
extra "bench".
"""
import csv
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import tyro

FIELDS = "seconds", "rss_mib", "files", "threads", "cpu_s", "step"


@dataclasses.dataclass
class Args:
    minutes: float = 30.0  # wall time
    every: float = 10.0  # seconds between samples
    csv: str = "soak.csv"  # file for the samples
    report: tuple[str, ...] = ()  # files to report on, nothing is run


def sample(process, began, step):
    """A row of FIELDS for a running process."""
    with process.oneshot():
        cpu = process.cpu_times()
        return (time.monotonic() - began, process.memory_info().rss / 2**20, process.num_fds(),
                process.num_threads(), cpu.user + cpu.system, step)


def soak(args, command):
    """Runs a command for some time and samples it; returns its exit code."""
    out = Path(args.csv).with_suffix(".log")
    with open(args.csv, "w", newline="") as f, open(out, "w") as log:
        writer, began = csv.writer(f), time.monotonic()
        writer.writerow(FIELDS)
        started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        process = psutil.Process(started.pid)
        while started.poll() is None and time.monotonic() - began < 60 * args.minutes:
            time.sleep(args.every)
            try:
                row = sample(process, began, last_step(out))
            except psutil.NoSuchProcess:
                break
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
            f.flush()
        if started.poll() is None:
            started.send_signal(signal.SIGTERM)
        return started.wait()


def last_step(log):
    """The agent step of the last line of progress, 0 before the first one."""
    steps = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("step ")]
    return int(steps[-1].replace(",", "")) if steps else 0


def report(paths):
    """The lines of a table of soaks."""
    yield ("| run | minutes | RSS, MiB | RSS slope, MiB per hour | open files | threads "
           "| steps/s, last third to middle | CPU s per 1000 steps, the same |")
    yield "|---|---|---|---|---|---|---|---|"
    for path in paths:
        with open(path, newline="") as f:
            rows = np.array([[float(row[k]) for k in FIELDS] for row in csv.DictReader(f)])
        seconds, rss, files, threads, cpu, step = rows.T
        late = seconds > seconds[-1] / 3
        slope = np.polyfit(seconds[late] / 3600, rss[late], 1)[0]
        (sps, cost), (sps0, cost0) = (
            rate(seconds, cpu, step, (part / 3, (part + 1) / 3)) for part in (2, 1))
        few = [f"{x.min():.0f}" if x.min() == x.max() else f"{x.min():.0f} to {x.max():.0f}"
               for x in (files[late], threads[late])]
        yield (f"| {Path(path).stem} | {seconds[-1] / 60:.0f} | {rss[-1]:.0f} | {slope:+.1f} | "
               f"{few[0]} | {few[1]} | {sps / sps0:.2f} | {cost / cost0:.2f} |")


def rate(seconds, cpu, step, span):
    """Steps per second, and CPU seconds per 1000 steps, in a part of the time."""
    i = [int(np.searchsorted(seconds, x * seconds[-1])) for x in span]
    i[1] = min(i[1], len(seconds) - 1)
    steps, wall, work = (x[i[1]] - x[i[0]] for x in (step, seconds, cpu))
    return steps / wall, 1000 * work / max(steps, 1)


if __name__ == "__main__":
    own, command = sys.argv[1:], []
    if "--" in own:
        own, command = own[:own.index("--")], own[own.index("--") + 1:]
    args = tyro.cli(Args, args=own, description=__doc__)
    if args.report:
        print(*report(args.report), sep="\n")
    elif not command or not shutil.which(command[0]):
        sys.exit("what is to be run comes after --")
    else:
        sys.exit(soak(args, command) not in (0, 143))
