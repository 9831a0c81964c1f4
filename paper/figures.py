"""Figures 1, 2 and 3 of the paper, and two more: runs what is missing and draws.

    python paper/figures.py 1                                            # all of it: a grid of days
    python paper/figures.py 1 --games pong --seeds 1 --frames 10M        # a part of it
    python paper/figures.py 1 --status                                   # the grid so far
    python paper/figures.py 1 --cell 7                                   # 7th line of --dry-run
    python paper/figures.py 2 --engine ray --address auto                # on a Ray cluster
    python paper/figures.py 1 --frames 1M -- --num-envs 8                # flags for every script

Figure 4 is section 5 beside A2C. Figures 5 and 6 are Figure 2 on Pong, on schedules for a CPU.
A cell of a grid (grids.json) is an arm, a game and a seed: one run of a script. What has finished,
with its last evaluation, is not run again, what was cut off resumes, and what fails is reported and
does not stop the rest. With fewer --frames the decays keep the figure's horizon, and a later call
with more goes on. Ctrl-C or SIGTERM ends the runs too, which save first. The figure is drawn (extra
"plot") from the CSVs of all runs so far, which are copied to --results-dir.
"""
import ctypes
import dataclasses
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict, namedtuple
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

import plots
import tyro
from plots import GRIDS, arm_folder, exact, short

if os.name == "posix":
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
ORPHAN_SECONDS = 60  # that a run whose starter was killed may take to save and end
RETRIES = 20  # of a run whose worker, node or process was lost, with Ray

@dataclasses.dataclass
class Args:
    figure: tyro.conf.Positional[Literal[tuple(GRIDS["figures"])]]  # of the paper; 4 to 6: below
    games: tuple[str, ...] = ()  # games by name, any case; none: all of the figure
    arms: tuple[str, ...] = ()  # arms by name; none: all of the figure
    seeds: int = 0  # runs of each arm and game, seeds 1 to this; 0: as in the figure
    frames: str = ""  # emulator frames of a run, as 2500000 or 2.5M; default: the figure's
    horizon: str = ""  # emulator frames of the decays; default: the figure's
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a cluster
    address: str = "auto"  # of the Ray cluster
    jobs: int = 0  # runs at once on this machine; 0: as many as cores and (Linux) memory allow
    threads: int = 0  # CPU threads of a run; 0: the cores over the runs at once, with Ray 1
    gpus: float = 0.25  # of a GPU for each run, with Ray
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks
    cell: int = 0  # run only this cell, as --dry-run numbers them; 0: all
    dry_run: bool = False  # print the command of every cell, one a line, and stop
    status: bool = False  # print the table of the grid and stop
    draw: bool = False  # collect the runs' CSVs, draw and stop
    runs_dir: str = "runs/paper"  # where the runs are
    results_dir: str = "results/paper"  # where CSVs are collected and the figure is drawn

# One run of a grid, of so many agent steps, in a folder: its place below --runs-dir, and below
# --results-dir. An arm of two figures has one place and is run once.
Cell = namedtuple("Cell", "arm game steps place folder script flags")

# === the grid ===
def number(text):
    """Frames from text such as 2500000, 2.5M or 300k."""
    found = re.fullmatch(r"(\d*\.?\d+)([kmb]?)", text.lower())
    frames = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[found[2]] if found else 0.0
    if frames < 4 or not frames.is_integer():
        raise ValueError(f"{text} is no number of frames; write 2500000, 2.5M or 300k")
    return int(frames)

def pick(flag, names, known):
    """The known names that were asked for, in any case; all of them where none was."""
    asked = {x.lower() for x in names or known}
    if asked - {x.lower() for x in known}:
        raise ValueError(f"{flag} {' '.join(names)}: the figure has {', '.join(known)}")
    return [x for x in known if x.lower() in asked]

def cells(args, extra=()):
    """The cells of a figure, in the order in which they are run: one seed of all arms first."""
    grid, found = GRIDS["figures"][args.figure], []
    for name in ("seeds", "jobs", "threads", "cell"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name)}: 0 or more")
    frames = number(args.frames or str(grid["frames"]))
    horizon = number(args.horizon or str(grid["frames"]))
    if frames > horizon:
        raise ValueError(f"--frames {exact(frames)} is more than --horizon {exact(horizon)}")
    every = min(grid["eval_every"], max(4, frames // 10)) // 4
    games = pick("--games", args.games, grid["games"])
    arms = pick("--arms", args.arms, grid["arms"])
    for seed, game, arm in product(range(1, 1 + (args.seeds or grid["seeds"])), games, arms):
        script, *flags = *grid["arms"][arm], *extra
        arm_place = arm_folder(args.figure, (script, *flags))
        place = Path(arm_place, game, exact(horizon), f"seed{seed}")
        below = os.path.relpath(Path(args.runs_dir, place), ROOT)
        flags = ("--env-id", f"ALE/{game}-v5", "--seed", str(seed), "--total-timesteps",
                 str(frames // 4), "--schedule-timesteps", str(horizon // 4), "--eval-every",
                 str(every), "--runs-dir", below, *grid["flags"], *flags)
        found.append(Cell(arm, game, frames // 4, place, ROOT / below, script, flags))
    if args.cell > len(found):
        raise ValueError(f"--cell {args.cell}: there are {len(found)}")
    return found[args.cell - 1:args.cell] if args.cell else found

def last(log, column):
    """A number in the last whole row of a CSV, 0 if there is none."""
    rows = [line.split(",") for line in log.read_text().split("\n")[:-1]]
    return float(rows[-1][rows[0].index(column)]) if len(rows) > 1 else 0.0

def finished(cell):
    """The folder of a run that has evaluated what it ended with, None if there is none."""
    logs = cell.folder.glob("*/eval.csv")
    return next((log.parent for log in logs if last(log, "step") >= cell.steps), None)

def run_folder(cell):
    """The run that has finished, else the newest with a checkpoint to go on from, else None."""
    saved = cell.folder.glob(f"*/{Path(cell.script).stem}.pt")
    return finished(cell) or max((path.parent for path in saved), default=None)  # named by time

def command_of(cell, threads, device):
    """Script and flags that start a cell's run or go on with it, from the repository's folder."""
    old = run_folder(cell)
    return [cell.script, "--threads", str(threads), "--device", device, *cell.flags,
            *(["--resume", os.path.relpath(old, ROOT)] if old else [])]

# === one run ===
def start(cell, threads, device):
    """Starts a cell's run, which locks log.txt to its end; None if another process holds that."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    linux = {}
    if sys.platform == "linux":  # PR_SET_PDEATHSIG: where its parent is killed, it saves and ends
        linux = dict(preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM))
    until = time.monotonic() + ORPHAN_SECONDS
    with open(cell.folder / "log.txt", "ab") as log:
        while os.name == "posix":
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    return None
                time.sleep(0.5)
        return subprocess.Popen([sys.executable, *command_of(cell, threads, device)], cwd=ROOT,
                                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                start_new_session=True, **linux)

def outcome(cell, process):
    """Waits for a run: "done", "cut off", or "failed: " and the last line of its log."""
    if process is None:
        return "failed: another process is training in its folder"
    code = process.wait()
    if code == 0 and finished(cell):
        return "done"
    if code < 0 or code > 128:
        return "cut off"
    lines = (cell.folder / "log.txt").read_text(errors="replace").strip().split("\n")
    return f"failed: {lines[-1] or f'exit code {code}'}"

def run_cell(cell, threads, device):
    """A task of Ray: a run from start or last checkpoint to its end; returns its outcome."""
    for _ in range(RETRIES):
        state = outcome(cell, start(cell, threads, device))
        if state != "cut off":  # somebody killed the run, and not the worker
            break
    return state

# === engines: they start runs, say which have ended and how, and end the rest ===
class Local:
    """Runs cells as processes of this machine, as many at once as cores and memory allow."""
    def __init__(self, args):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.device, most, free = "cpu", cores, free_gib()
        if args.device != "cpu":
            import torch
            if args.device == "cuda" or torch.cuda.is_available():
                # a learner on a GPU leaves its cores to the emulator, of which four keep it busy
                self.device, most, free = "cuda", cores // 4, torch.cuda.mem_get_info()[0] / 2**30
        fit = free / GRIDS["figures"][args.figure]["memory_gib"][self.device]
        self.jobs = args.jobs or int(max(1, min(most, fit)))
        self.threads = args.threads or max(1, cores // self.jobs)
        self.start, self.slots = start, self.jobs

    def ended(self, running):
        time.sleep(0.2)
        return {cell: outcome(cell, process) for cell, process in running.items()
                if process is None or process.poll() is not None}

    def end(self, running):
        for process in filter(None, running.values()):
            # a job scheduler may have sent them SIGTERM, of which a second one would kill them
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        for process in filter(None, running.values()):
            process.wait()

def free_gib():
    """Memory of this machine that could be taken now, where Linux says so."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", path.read_text() if path.exists() else "")
    return int(found[1]) / 2**20 if found else math.inf

class OnRay:
    """Runs cells as tasks of a Ray cluster, whose nodes share the repository and --runs-dir."""
    def __init__(self, args):
        try:
            import ray
            ray.init(address=args.address, log_to_driver=False, ignore_reinit_error=True)
        except (ImportError, ConnectionError, ValueError, RuntimeError) as e:
            raise ValueError(f"--engine ray (extra \"ray\"), --address {args.address}: {e}") from e
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers may not find it
        has, self.threads, self.ray = ray.cluster_resources(), args.threads or 1, ray
        self.device, self.jobs = "cpu", int(has.get("CPU", 1)) // self.threads
        needs = dict(memory=int(GRIDS["figures"][args.figure]["memory_gib"]["cpu"] * 2**30))
        if args.device == "cuda" or args.device == "auto" and "GPU" in has:
            self.device, needs = "cuda", dict(num_gpus=args.gpus)
            self.jobs = min(self.jobs, int(has.get("GPU", 0) / args.gpus))
        task = ray.remote(num_cpus=self.threads, max_retries=RETRIES, **needs)(run_cell)
        self.start, self.slots = task.remote, math.inf  # a cluster may grow with what is queued

    def ended(self, running):
        states, (refs, _) = {}, self.ray.wait(list(running.values()), timeout=1)
        for cell in [cell for cell, ref in running.items() if ref in refs]:
            try:
                states[cell] = self.ray.get(running[cell])
            except self.ray.exceptions.RayError as e:
                states[cell] = f"failed: {str(e).splitlines()[0]}"
        return states

    def end(self, running):
        for ref in running.values():  # the worker is killed, its run saves and ends
            self.ray.cancel(ref, force=True)

# === all runs ===
def run(engine, grid, states):
    """Runs what is not done; prints what ends, and the table then and every ten minutes."""
    queue, running, due = [cell for cell in grid if states[cell] != "done"], {}, 0
    try:
        while queue or running:
            while queue and len(running) < engine.slots:
                cell = queue.pop(0)
                running[cell] = engine.start(cell, engine.threads, engine.device)
            if time.monotonic() > due:
                print(table(grid, states, engine.jobs), flush=True)
                due = time.monotonic() + 600
            for cell, state in engine.ended(running).items():
                print(f"{cell.place}: {state}")
                states[cell], due = state, 0
                del running[cell]
    finally:  # where a signal or an error has ended the loop, runs save and end
        engine.end(running)
        print(table(grid, states, engine.jobs), flush=True)

def table(grid, states, jobs):
    """The lines of the progress table: one for each arm and game, one for all of them."""
    rows, speeds, left = defaultdict(Counter), defaultdict(list), []
    for cell in grid:
        log = max(cell.folder.glob("*/metrics.csv"), default=Path(os.devnull))
        state = states[cell].split(":")[0]
        step = cell.steps if state == "done" else min(cell.steps, int(last(log, "step")))
        rows[cell.arm, cell.game].update({"runs": 1, state: 1, "step": step, "of": cell.steps})
        if state not in ("done", "failed"):
            left.append((cell.script, cell.steps - step))
        if speed := last(log, "sps"):
            speeds[cell.script].append(speed)
    rows["all", ""] = sum(rows.values(), Counter())
    lines = [f"{arm:22} {game:10} done {row['done']} of {row['runs']}, failed {row['failed']}, "
             f"frames {short(4 * row['step'])} of {short(4 * row['of'])}"
             for (arm, game), row in rows.items()]
    seconds = sum(steps / median(speeds[script] or [math.nan]) for script, steps in left)
    hours = seconds / 3600 / max(1, min(jobs, len(left)))
    time_left = f", time left {hours:.1f} h with {jobs} at once".replace("nan h", "unknown")
    return "\n".join(lines) + time_left

def figure(args, extra=()):
    """Does what the flags say; returns the outcome of each cell of the grid that it looked at."""
    grid = cells(args, extra)
    if args.dry_run:
        for cell in grid:
            print("python", shlex.join(command_of(cell, args.threads, args.device)))
        return {}
    drawn = not (args.status or args.cell)
    if drawn and not importlib.util.find_spec("matplotlib"):  # said before days of work
        raise ValueError("drawing needs the package: pip install -e '.[plot]'")
    states = {cell: "done" if finished(cell) else "left" for cell in grid}
    if args.status:
        print(table(grid, states, args.jobs or os.cpu_count()))
    elif "left" in states.values() and not args.draw:
        run({"local": Local, "ray": OnRay}[args.engine](args), grid, states)
    if drawn:
        for cell in grid:
            if folder := run_folder(cell):
                place = Path(args.results_dir, cell.place)
                place.mkdir(parents=True, exist_ok=True)
                for file in (*folder.glob("*.csv"), *folder.glob("args*.json")):
                    shutil.copy(file, place)
        for path in plots.draw(args.figure, args.results_dir, extra=extra):
            print(f"wrote {path}")
    return states

def main():
    """The command line."""
    for n in (signal.SIGINT, signal.SIGTERM):
        signal.signal(n, lambda n, _: sys.exit(128 + n))
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        args = tyro.cli(Args, args=sys.argv[1:end], description=__doc__)
        states = figure(args, extra=sys.argv[end + 1:])
        sys.stdout.flush()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # as in `| head -1`; nothing is left to be said at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(any(state.startswith("failed") or state == "cut off" for state in states.values()))

if __name__ == "__main__":
    main()
