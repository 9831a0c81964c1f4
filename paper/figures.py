"""Figures 1, 2 and 3 of the paper, and a fourth for its section 5: runs what is missing and draws.

    python paper/figures.py 1                                            # all of it: a grid of days
    python paper/figures.py 1 --games pong --seeds 1 --frames 10M        # a part of it
    python paper/figures.py 1 --status                                   # the grid so far
    python paper/figures.py 1 --dry-run                                  # its commands, one a line
    python paper/figures.py 1 --cell 7                                   # the 7th of these lines
    python paper/figures.py 1 --draw                                     # only collect and draw
    python paper/figures.py 2 --engine ray --address auto                # on a Ray cluster
    python paper/figures.py 1 --frames 1M -- --num-envs 8                # flags for every script

grids.json holds the grids. A cell of one is an arm, a game and a seed; it is a run of its script,
as a user starts it, in a folder named after these and the horizon. What has finished is not run
again, what was cut off resumes, what fails is reported and does not stop the rest. With fewer
--frames the decays keep the horizon of the figure, so that a later call with more of them goes on.

SIGINT and SIGTERM are passed on to the runs, which save and end. The CSVs of all runs so far are
copied to --results-dir, and the figure is drawn from what lies there (extra "plot").
"""
import csv
import ctypes
import dataclasses
import fcntl
import importlib.util
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))
import plots  # noqa: E402
from plots import GRIDS, arm_folder, exact, short  # noqa: E402

LAST_LINES = 2000  # characters at the end of a log that are looked through for its error
ORPHAN_SECONDS = 60  # that a run whose starter was killed may take to save and end
LATELY = 300  # seconds
BUSY = "failed: another process is training in its folder"
RETRIES = 20  # of a run whose worker, node or process was lost, with Ray


@dataclasses.dataclass
class Args:
    figure: tyro.conf.Positional[Literal["1", "2", "3", "4"]]  # of the paper; 4: section 5
    games: tuple[str, ...] = ()  # games by name, any case; none: all six
    arms: tuple[str, ...] = ()  # arms by name; none: all of the figure
    seeds: int = 0  # runs of each arm and game, seeds 1 to this; 0: as in the figure
    frames: str = ""  # emulator frames of a run, as 2500000 or 2.5M; default: the figure's
    horizon: str = ""  # emulator frames of the decays; default: the figure's
    engine: Literal["local", "ray"] = "local"  # processes of this machine, or tasks of a cluster
    address: str = "auto"  # of the Ray cluster
    jobs: int = 0  # runs at once on this machine; 0: as many as cores and memory allow
    threads: int = 0  # CPU threads of a run; 0: the cores over the runs at once, with Ray 1
    gpus: float = 0.25  # of a GPU for each run, with Ray
    device: Literal["auto", "cpu", "cuda"] = "auto"  # of the networks
    cell: int = 0  # run only this cell, as --dry-run numbers them; 0: all
    dry_run: bool = False  # print the command of every cell, one a line, and stop
    status: bool = False  # print the table of the grid and stop
    draw: bool = False  # collect the runs' CSVs, draw and stop
    runs_dir: str = "runs/paper"  # where the runs are
    results_dir: str = "results/paper"  # where CSVs are collected and the figure is drawn


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    figure: str
    arm: str
    game: str
    seed: int
    frames: int
    horizon: int
    command: tuple  # script and flags of the arm, then those of the user
    eval_every: int  # agent steps
    runs_dir: str  # relative to the repository, or absolute

    @property
    def steps(self):
        return self.frames // 4

    @property
    def place(self):
        """Its folder below --runs-dir and --results-dir; an arm of two figures is run once."""
        return Path(arm_folder(self.command), self.game, exact(self.horizon), f"seed{self.seed}")

    @property
    def folder(self):
        return ROOT / self.runs_dir / self.place

    def __str__(self):
        return f"{self.arm}, {self.game}, seed {self.seed}"


class Refused(Exception):
    """What the user can put right, in one sentence."""


class Busy(Exception):
    """Another process is training in the cell's folder."""


# === the grid ===
def number(text):
    """Frames from text such as 2500000, 2.5M or 300k."""
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower())
    try:
        value = float(text[:-1] if unit else text) * (unit or 1)
        if value.is_integer() and value >= 4:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise Refused(f"{text} is no number of frames; write 2500000, 2.5M or 300k")


def cells(args, extra=()):
    """The cells of a figure, in the order in which they are run: one seed of all arms first."""
    grid = GRIDS["figures"][args.figure]
    known = {game.lower(): game for game in GRIDS["games"]}
    for game in args.games:
        if game.lower() not in known:
            raise Refused(f"--games {game}: the figure has {', '.join(known.values())}")
    for arm in args.arms:
        if arm not in grid["arms"]:
            raise Refused(f"--arms {arm}: the figure has {', '.join(grid['arms'])}")
    for name in ("seeds", "jobs", "threads", "cell"):
        if getattr(args, name) < 0:
            raise Refused(f"--{name} {getattr(args, name)}: 0 or more")
    games = [known[game.lower()] for game in args.games] or GRIDS["games"]
    frames, horizon = (number(text) if text else grid["frames"]
                       for text in (args.frames, args.horizon))
    if frames > horizon:
        raise Refused(f"--frames {exact(frames)} is more than --horizon {exact(horizon)}")
    every = min(grid["eval_every"], max(4, frames // 10))
    runs_dir = Path(args.runs_dir).resolve()
    runs_dir = str(runs_dir.relative_to(ROOT) if ROOT in runs_dir.parents else runs_dir)
    grid = [Cell(args.figure, arm, game, seed, frames, horizon, (*grid["arms"][arm], *extra),
                 max(1, every // 4), runs_dir)
            for seed in range(1, 1 + (args.seeds or grid["seeds"])) for game in games
            for arm in args.arms or grid["arms"]]
    if args.cell > len(grid):
        raise Refused(f"--cell {args.cell}: there are {len(grid)}")
    return grid[args.cell - 1:args.cell] if args.cell else grid


def run_folder(folder):
    """The newest run with a checkpoint below the folder of a cell, or None."""
    found = sorted(Path(folder).glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def last_row(path):
    """The last whole row of a CSV as a dict of text, {} if there is none."""
    text = path.read_text() if path.exists() else ""
    rows = list(csv.DictReader(text[:text.rfind("\n") + 1].splitlines()))
    return rows[-1] if rows else {}


def done_steps(cell):
    """Agent steps that a cell has logged, and their speed in the last row, NaN if unknown."""
    logs = sorted(cell.folder.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    row = last_row(logs[-1]) if logs else {}
    return int(row.get("step", 0)), float(row.get("sps", math.nan))


def finished(cell):
    """Whether a cell's run has logged its last step and saved the network that it ended with."""
    folder = run_folder(cell.folder)
    if not folder or int(last_row(folder / "metrics.csv").get("step", 0)) < cell.steps:
        return False
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    return saved["step"] >= cell.steps


def command_of(cell, threads, device):
    """Script and flags that start a cell's run or go on with it, from the repository's folder."""
    script, *flags = cell.command
    below = Path(cell.runs_dir) / cell.place
    if folder := run_folder(cell.folder):
        return [script, "--resume", str(below / folder.name), "--total-timesteps", str(cell.steps),
                "--device", device]
    return [script, "--env-id", f"ALE/{cell.game}-v5", "--seed", str(cell.seed),
            "--total-timesteps", str(cell.steps), "--schedule-timesteps", str(cell.horizon // 4),
            "--eval-every", str(cell.eval_every), "--threads", str(threads), "--device", device,
            "--runs-dir", str(below), *flags]


# === one run ===
def start(cell, threads, device):
    """Starts a cell's run; its output goes to log.txt in the cell's folder.

    If this process is killed, the run is told to save and end (on Linux), and whoever takes over
    waits for that.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + ORPHAN_SECONDS
    while in_use(cell.folder):
        if time.monotonic() > until:
            raise Busy
        time.sleep(0.5)
    with open(cell.folder / "log.txt", "ab") as log:
        return subprocess.Popen([sys.executable, *command_of(cell, threads, device)], stdout=log,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                                preexec_fn=end_with_parent, start_new_session=True)


def end_with_parent():
    """In a child: SIGTERM when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def in_use(folder):
    """Whether a process is training in a run below a cell's folder."""
    for lock in Path(folder).glob("*/lock"):
        with open(lock) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def outcome(cell, code):
    """What an exit code means: "done", "cut off", or "failed: " and the last line of the log."""
    if code == 0 and finished(cell):
        return "done"
    if code < 0 or code > 128:
        return "cut off"
    log = cell.folder / "log.txt"
    lines = log.read_text(errors="replace")[-LAST_LINES:].split("\n") if log.exists() else []
    lines = [line for line in lines if line.strip()]
    return f"failed: {lines[-1].strip() if lines else f'exit code {code}'}"


# === engines ===
class Local:
    """Runs cells as processes of this machine, as many at once as cores and memory allow."""

    def __init__(self, args):
        self.device = args.device
        if args.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        # a learner on a GPU leaves its cores to the emulator, of which four keep it busy
        self.jobs = args.jobs or (max(1, cores // 4) if self.device == "cuda" else cores)
        self.threads = args.threads or max(1, cores // self.jobs)
        self.free, self.running, self.signal = free_gib(self.device), {}, 0

    def run(self, todo, show):
        """Runs cells; show(states) is called now and then. Returns the outcome of each cell."""
        states, queue = dict.fromkeys(todo, "left"), list(todo)
        handlers = {k: signal.signal(k, self.on_signal) for k in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or (queue and not self.signal):
                if queue and not self.signal and self.fits(queue[0]):
                    cell = queue.pop(0)
                    try:
                        self.running[cell] = start(cell, self.threads, self.device)
                        states[cell] = "running"
                    except Busy:
                        states[cell] = BUSY
                    continue
                for cell, process in list(self.running.items()):
                    if (code := process.poll()) is not None:
                        del self.running[cell]
                        states[cell] = outcome(cell, code)
                show(states)
                time.sleep(0.2)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        show(states, end=True)
        if self.signal:
            sys.exit(128 + self.signal)
        return states

    def fits(self, cell):
        """Whether there is room for one more; a first one is always tried."""
        memory = sum(memory_gib(c, self.device) for c in (*self.running, cell))
        return not self.running or (len(self.running) < self.jobs and memory <= self.free)

    def on_signal(self, number, _):
        self.signal = number
        for process in self.running.values():
            process.terminate()  # it saves first


def memory_gib(cell, device):
    needs = GRIDS["memory_gib"][device]
    return needs.get(cell.command[0], needs["other"])


def free_gib(device):
    """Memory that could be taken now, of the GPU or of this machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30
    if Path("/proc/meminfo").exists():
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0]) / 2**20
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def run_cell(cell, threads, device):
    """A task of Ray: a run from start or last checkpoint to its end; returns its outcome."""
    try:
        for _ in range(RETRIES):
            state = outcome(cell, start(cell, threads, device).wait())
            if state != "cut off":  # somebody killed the run, and not the worker
                break
        return state
    except Busy:
        return BUSY


class OnRay:
    """Runs cells as tasks of a Ray cluster, whose nodes share the repository and --runs-dir.

    A task whose worker or node is lost is started again, elsewhere if need be, and goes on from the
    last checkpoint.
    """

    def __init__(self, args):
        if not importlib.util.find_spec("ray"):
            raise Refused("--engine ray needs the package: pip install -e '.[ray]'")
        import ray
        if not ray.is_initialized():
            try:
                ray.init(address=args.address, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as e:
                raise Refused(f"--address {args.address}: no Ray cluster there ({e})") from e
        if __name__ != "__main__":  # workers need not find this module
            ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.cloudpickle.register_pickle_by_value(plots)
        has, self.threads, self.ray = ray.cluster_resources(), args.threads or 1, ray
        self.device = "cuda" if args.device != "cpu" and has.get("GPU", 0) > 0 else "cpu"
        if args.device == "cuda" != self.device:
            raise Refused("--device cuda: the Ray cluster has no GPU")
        self.options = dict(num_cpus=self.threads, max_retries=RETRIES)
        self.jobs = int(has.get("CPU", 1)) // self.threads
        if self.device == "cuda":
            self.options["num_gpus"] = args.gpus
            self.jobs = min(self.jobs, int(has["GPU"] / args.gpus))
        self.jobs = max(1, self.jobs)

    def run(self, todo, show):
        """Runs cells; show(states) is called now and then. Returns the outcome of each cell."""
        task, states = self.ray.remote(run_cell), dict.fromkeys(todo, "queued")
        left = {}
        for cell in todo:
            needs = self.options | dict(memory=int(memory_gib(cell, self.device) * 2**30)) if (
                self.device == "cpu") else self.options
            left[task.options(**needs).remote(cell, self.threads, self.device)] = cell
        handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            while left:
                for ref in self.ray.wait(list(left), timeout=1)[0]:
                    cell = left.pop(ref)
                    try:
                        states[cell] = self.ray.get(ref)
                    except self.ray.exceptions.RayError as e:
                        states[cell] = f"failed: {str(e).splitlines()[0]}"
                show(states)
        finally:
            for ref in left:  # the worker is killed, its run saves and ends
                self.ray.cancel(ref, force=True)
            signal.signal(signal.SIGTERM, handler)
        show(states, end=True)
        return states


# === progress ===
def active(cell):
    """Whether a run has written to its log lately; it does every few seconds but in evaluations.

    Its lock is not tried, as that would keep a run that starts at this moment from having it.
    """
    log = cell.folder / "log.txt"
    return log.exists() and time.time() - log.stat().st_mtime < LATELY


def table(grid, states, jobs):
    """The lines of the progress table: a row for each arm and game, a line for all of it."""
    rows, left, speeds = {}, [], {}
    for cell in grid:
        step, sps = done_steps(cell)
        done = states.get(cell) == "done"
        row = rows.setdefault((cell.arm, cell.game), dict(done=0, running=0, left=0, failed=0,
                                                          steps=0, of=0))
        kind = (states.get(cell) or "left").split(":")[0]
        kind = "running" if kind in ("queued", "not done") and active(cell) else kind
        row[kind if kind in row else "left"] += 1
        row["steps"] += cell.steps if done else min(step, cell.steps)
        row["of"] += cell.steps
        if sps == sps:
            speeds.setdefault(cell.command[0], []).append(sps)
        if not done and kind != "failed":
            left.append((cell, max(0, cell.steps - step), sps))
    yield (f"{'arm':22} {'game':10} {'done':>5} {'running':>8} {'left':>5} {'failed':>7} "
           f"{'frames':>16}")
    for (arm, game), row in rows.items():
        frames = f"{short(4 * row['steps'])} of {short(4 * row['of'])}"
        yield (f"{arm:22} {game:10} {row['done']:5} {row['running']:8} {row['left']:5} "
               f"{row['failed']:7} {frames:>16}")
    total = {k: sum(row[k] for row in rows.values()) for k in ("done", "running", "left", "failed")}
    every = [x for of in speeds.values() for x in of]
    hours = 0.0
    for cell, steps, sps in left:  # a cell that has not begun: as fast as its script elsewhere
        sps = sps if sps == sps else statistics.median(speeds.get(cell.command[0]) or every or [0])
        hours += steps / sps / 3600 if sps else math.inf
    hours /= max(1, min(jobs, len(left)))
    time_left = "unknown" if math.isinf(hours) else f"{hours:.1f} h with {jobs} at once"
    yield "  ".join(f"{k} {n}" for k, n in total.items()) + f"  time left {time_left}"


class Progress:
    """Prints the table when a state changes, in a terminal also every ten seconds, in its place."""

    def __init__(self, grid, states, jobs):
        self.grid, self.states, self.jobs = grid, states, jobs
        self.shown, self.at, self.lines = {}, -math.inf, 0

    def __call__(self, states, end=False):
        states = self.states | states
        changed, terminal = states != self.shown, sys.stdout.isatty()
        every = 10 if terminal else 600
        if not (changed or end or time.monotonic() - self.at > every):
            return
        failures = [f"{cell}: {state}" for cell, state in states.items()
                    if state.startswith("failed") and self.shown.get(cell) != state]
        lines = list(table(self.grid, states, self.jobs))
        if terminal and self.lines:
            print(f"\033[{self.lines}F\033[J", end="")
        print(*failures, *lines, sep="\n", flush=True)
        self.lines = len(lines)
        self.shown, self.at = states, time.monotonic()


# === the command line ===
def collect(grid, results_dir):
    """Copies what the runs of a grid have logged, with what made them, to --results-dir."""
    for cell in grid:
        if folder := run_folder(cell.folder):
            place = Path(results_dir) / cell.place
            place.mkdir(parents=True, exist_ok=True)
            for file in (*folder.glob("*.csv"), *folder.glob("args*.json")):
                shutil.copy(file, place)


def figure(args, extra=()):
    """Does what the flags say; returns the outcome of each cell of the grid that it looked at."""
    grid = cells(args, extra)
    drawn = not (args.dry_run or args.status or args.cell)
    if drawn and not importlib.util.find_spec("matplotlib"):  # said before days of work
        raise Refused("drawing needs the package: pip install -e '.[plot]'")
    if args.dry_run:
        for cell in grid:
            print("python", shlex.join(command_of(cell, args.threads, args.device)))
        return {}
    states = {cell: "done" if finished(cell) else "not done" for cell in grid}
    todo = [cell for cell in grid if states[cell] != "done"]
    if args.status:
        print(*table(grid, states, args.jobs or os.cpu_count()), sep="\n")
    elif todo and not args.draw:
        engine = {"local": Local, "ray": OnRay}[args.engine](args)
        states |= engine.run(todo, Progress(grid, states, engine.jobs))
    if drawn:
        collect(grid, args.results_dir)
        for path in plots.draw(args.figure, args.results_dir, extra=extra):
            print(f"wrote {path}")
    return states


def main():
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[:own.index("--")], own[own.index("--") + 1:]
    try:
        states = figure(tyro.cli(Args, args=own, description=__doc__), extra)
    except Refused as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(any(state.startswith("failed") or state == "cut off" for state in states.values()))


if __name__ == "__main__":
    main()
