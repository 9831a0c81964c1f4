"""Watch an agent play: a GIF or a video of the game, with what its network says beside the screen.

    pip install -e '.[watch]'
    python paper/watch.py runs/Breakout__a2c_proper__seed1__20260101-120000
    python paper/watch.py runs/Breakout... --start 20 --seconds 15 --seed 1 --out breakout.mp4

Beside the screen stand the policy that acts with the action it took, V(s), and the entropy of the
policy, both with their last ten seconds. The run may be of any of the five scripts; it acts as in
its evaluations, soft_dqn.py epsilon-greedily, whose V is that of its backup.

The agent sees the pictures that it was trained on. The screen comes from a second emulator with the
same settings, seeds and actions; each step is checked to be the same in both. With the run's own
--seed the first game is the one that the script scores with --evaluate and --eval-games 1.
"""
import dataclasses
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts

SCRIPTS = "a2c_naive", "a2c_proper", "soft_dqn", "pgql_equiv", "natural_pg_damped"
ARM = "update", "backup", "parameterization", "solver", "n_step", "regularizer", "tau"
STEPS_PER_SECOND = 15  # agent steps, 4 frames each, in a second of the game

@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]  # folder of the run
    out: str = ""  # file to write, .gif or .mp4; default: step<k>_seed<k>.gif in the run's folder
    start: float = 0.0  # seconds that are played before the film, 15 agent steps each
    seconds: float = 30.0  # at most so much is filmed
    games: int = 1  # at most so many games
    seed: int = 0  # games and sampling noise derive from it
    scale: int = 2  # pixels of the film for one of the game's, each way
    fps: float = 15.0  # pictures per second, one for each agent step; 15 is real time

LIMITS = dict(start=(0, 36_000), seconds=(0.1, 36_000), games=(1, 1e6), seed=(0, 2**32 - 1),
              scale=(2, 8), fps=(1, 50))
LONGEST_GIF = 300  # seconds; a GIF is held in memory until it is written

# === the agent ===
class Agent(NamedTuple):
    """A run that was opened for an evaluation by the script that made it."""
    script: object  # the module
    run: object  # its Run, with the trained networks as run.parts
    act: object  # obs (1, 4, 84, 84), noise (1, A) -> a (1,), as the script's evaluations act
    seed: int  # that it was trained with
    envs: object  # the script's Atari, with one game

def read_agent(folder, seed):
    """The agent of a run folder, to play on a seed."""
    names = [name for name in SCRIPTS if (Path(folder) / f"{name}.pt").exists()]
    if not names:
        raise ValueError(f"{folder}: no checkpoint of one of the scripts lies there")
    script, opened = importlib.import_module(names[0]), []
    saved = torch.load(Path(folder, script.CHECKPOINT), "cpu", weights_only=True, mmap=True)["args"]
    here = dict(seed=seed, num_envs=1, device="cpu", evaluate=str(folder), resume="")

    def keep(run, act):  # takes the place of the evaluation
        opened.append((run, act))

    evaluate, script.Run.evaluate = script.Run.evaluate, keep
    try:
        script.train(script.Args(**(saved | here)))
    finally:
        script.Run.evaluate = evaluate
    run, act = opened[0]
    return Agent(script, run, act, saved["seed"], script.Atari(run.args, 1))

@torch.no_grad()
def opinion(agent, obs):
    """What its networks say of obs (1, 4, 84, 84): the policy that acts (A,) and V, a float."""
    args, parts = agent.run.args, agent.run.parts
    if agent.script.__name__ == "soft_dqn":
        Q = parts["net"](obs)
        A, tau = Q.shape[-1], 0.0 if args.backup == "hard" else args.tau
        V = agent.script.soft_value(Q, -math.log(A) if args.backup == "soft-kl" else 0.0, tau)
        best = torch.nn.functional.one_hot(Q.argmax(-1), A)
        pi = (1 - args.eval_epsilon) * best + args.eval_epsilon / A
    else:
        both = (parts["pi"](obs), parts["V"](obs)) if "pi" in parts else parts["net"](obs)
        pi, V = both[0].exp(), both[1]
    return pi[0].numpy(), float(V)

# === the game ===
class Moment(NamedTuple):
    """An agent step: what was seen, said, done and scored."""
    obs: np.ndarray  # (4, 84, 84) uint8, as the agent saw it
    screen: np.ndarray  # (210, 160, 3) uint8, the same for the viewer
    pi: np.ndarray  # (A,) the policy that acts
    V: float  # V(s)
    a: int
    score: float  # of the game, with what a earned
    length: int  # agent steps of the game, with this one
    game: int  # from 1
    over: bool  # whether it ends with this step

def in_color(envs):
    """A second emulator of the same game with the same settings; its pictures are the screen's."""
    screen = dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
    one = dict(num_envs=1, vectorization_mode="vector_entry_point")
    return gym.make_vec(envs.spec.id, **(envs.spec.kwargs | one | screen))

def moments(agent, steps, games):
    """Yields a Moment for each agent step, until so many steps or games have been played."""
    run, envs, screens, rewards = agent.run, agent.envs, in_color(agent.envs.envs), (0, 0)
    seeds = run.seeds(b"evaluation", 1)
    obs, (screen, info) = envs.reset(seeds), screens.reset(seed=seeds)
    torch.manual_seed(run.seeds(b"evaluation noise")[0])
    for t in range(steps + 1):
        frames = int(envs.frame[0]), int(info["episode_frame_number"][0])
        if frames[0] != frames[1] or rewards[0] != rewards[1]:
            raise RuntimeError(f"the screen is not that of the game after {t} agent steps: "
                               f"frames {frames}, rewards {rewards}")
        ended = len(envs.ended)
        if t == steps or ended == games:
            return
        a = agent.act(obs, torch.empty(1, envs.n_actions).exponential_())
        seen = obs[0].numpy(), screen[0, 0], *opinion(agent, obs), int(a)
        envs.send(a)
        obs, reward, *_ = envs.recv()
        screen, same, *_, info = screens.step(a.numpy())
        rewards, over = (int(reward[0]), int(same[0])), len(envs.ended) > ended
        score, length = envs.ended[-1][1:] if over else (envs.score[0], envs.length[0])
        yield Moment(*seen, float(score), int(length), ended + 1, over)

# === the film ===
GROUND, GRID, DIM, TEXT = (22, 24, 29), (52, 56, 64), (150, 155, 165), (232, 234, 238)
BAR, TAKEN, CURVE = (84, 132, 190), (255, 160, 64), (120, 200, 150)
WIDTH, HEIGHT, MARGIN, TOP = 680, 508, 12, 74  # lengths are in pixels of a film with --scale 2
LEFT, RIGHT = 2 * MARGIN + 320, WIDTH - MARGIN  # of what stands beside the screen

class Film:
    """Draws Moments, one after another."""
    def __init__(self, agent, scale):
        from PIL import Image, ImageDraw, ImageFont
        self.Image, self.ImageDraw, args = Image, ImageDraw, agent.run.args
        self.scale, self.k = scale, scale / 2
        self.font = {n: ImageFont.load_default(n * self.k) for n in (12, 14, 20)}
        self.size = WIDTH * scale // 2, HEIGHT * scale // 2
        self.game = args.env_id[4:-3]
        self.names = [re.sub("(?<=.)(LEFT|RIGHT|FIRE)", r" \1", action.name).lower()
                      for action in agent.envs.envs.ale.get_action_set()]
        arm = [f"{name} {getattr(args, name)}" for name in ARM if hasattr(args, name)
               and not (name == "tau" and getattr(args, "backup", "") == "hard")]
        acts = f"epsilon {args.eval_epsilon:g}" if "backup" in vars(args) else "samples from pi"
        self.about = (f"{agent.script.__name__}.py: {', '.join(arm)}", f"after {agent.run.step:,} "
                      f"agent steps of training, seed {agent.seed}; {acts}")
        self.V, self.entropy = [], []  # so far

    def picture(self, moment):
        """The next Moment as a picture, RGB."""
        picture, screen = self.Image.new("RGB", self.size, GROUND), moment.screen
        self.draw = self.ImageDraw.Draw(picture)
        large = screen.repeat(self.scale, 0).repeat(self.scale, 1)
        picture.paste(self.Image.fromarray(large), (int(MARGIN * self.k), int(TOP * self.k)))
        self.text(MARGIN, 8, self.game, TEXT, 20)
        self.text(WIDTH / 2, 12, f"game {moment.game}, step {moment.length:,}", DIM, anchor="ma")
        self.text(RIGHT, 8, f"score {moment.score:,.0f}", TEXT, 20, "ra")
        for i, line in enumerate(self.about):
            self.text(MARGIN, 34 + 16 * i, line, DIM)
        self.V.append(moment.V)
        self.entropy.append(float(-np.sum(moment.pi * np.log(np.maximum(moment.pi, 1e-30)))))
        low, high = min(self.V), max(self.V)
        slack = max(0.0, 0.1 - (high - low)) / 2  # or a V that hardly moves would fill its frame
        middle = self.bars(moment) + MARGIN
        half = (HEIGHT - MARGIN - middle) / 2
        self.curve(middle, half, "value V(s), last 10 s", self.V, low - slack, high + slack)
        self.curve(middle + half, half, "entropy of pi, nats", self.entropy,
                   0, math.log(len(moment.pi)))
        return picture

    def text(self, x, y, text, color, size=14, anchor="la"):
        self.draw.text((x * self.k, y * self.k), text, color, self.font[size], anchor)

    def box(self, x0, y0, x1, y1, color):
        x0, y0, x1, y1 = (round(x * self.k) for x in (x0, y0, x1, y1))
        if x1 > x0:
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), color)

    def bars(self, moment):
        """pi(. | s), a row for each action; returns where the rows end."""
        self.text(LEFT, TOP - 2, "policy pi(a | s)", DIM)
        row, x0, x1 = min(24, 252 / len(self.names)), LEFT + 112, RIGHT - 38
        for i, (name, p) in enumerate(zip(self.names, moment.pi.tolist())):
            y, color = TOP + 18 + i * row, TAKEN if i == moment.a else TEXT
            self.text(LEFT + 10, y + row / 2, name, color, 12, "lm")
            self.text(RIGHT, y + row / 2, f"{p:.3f}", color, 12, "rm")
            self.box(x0, y + 2, x1, y + row - 2, GRID)
            self.box(x0, y + 2, x0 + (x1 - x0) * p, y + row - 2, TAKEN if i == moment.a else BAR)
            if i == moment.a:
                self.text(LEFT, y + row / 2, ">", TAKEN, 14, "lm")
        return TOP + 18 + row * len(self.names)

    def curve(self, top, height, name, values, low, high):
        """The last ten seconds of a value, the newest at the right, and its number."""
        last, right = 10 * STEPS_PER_SECOND, RIGHT - 50
        y0, y1 = top + 18, top + height - 6
        self.text(LEFT, top, name, DIM)
        self.text(right, top, f"{values[-1]:.3f}", CURVE, 14, "ra")
        self.box(LEFT, y0, right, y1, GRID)
        self.text(RIGHT, y0 - 2, f"{high:.2f}", DIM, 12, "ra")
        self.text(RIGHT, y1 + 2, f"{low:.2f}", DIM, 12, "rd")
        points = [(self.k * (right - 4 - (right - LEFT - 8) * i / last),
                   self.k * (y1 - 4 - (y1 - y0 - 8) * (v - low) / (high - low)))
                  for i, v in enumerate(values[:-last - 1:-1])]
        self.draw.line(points, CURVE, round(2 * self.k), "curve")

def write(pictures, size, out, fps):
    """Writes the pictures, an iterator, to a .gif or .mp4."""
    if out.suffix == ".mp4":
        import imageio_ffmpeg
        video = imageio_ffmpeg.write_frames(str(out), size, fps=fps, macro_block_size=2)
        video.send(None)
        for picture in pictures:
            video.send(picture.tobytes())
        video.close()
    else:
        # 2 is an octree: as good here as the default, in a seventh of the time
        first, *rest = (picture.quantize(method=2, dither=0) for picture in pictures)
        # times are whole hundredths of a second there; these do not drift away from fps
        ends = [10 * round(100 * i / fps) for i in range(len(rest) + 2)]
        durations = [b - a for a, b in zip(ends, ends[1:])]
        first.save(out, save_all=True, append_images=rest, duration=durations, loop=0)

# === the command line ===
def check(args):
    """Raises ValueError on flags that make no sense or need what is not installed."""
    for name, (low, high) in LIMITS.items():
        if not low <= (value := getattr(args, name)) <= high:  # NaN fails this too
            raise ValueError(f"--{name} {value} is not between {low:,} and {high:,}")
    suffix = Path(args.out).suffix if args.out else ".gif"
    if suffix not in (".gif", ".mp4"):
        raise ValueError(f"--out {args.out}: a name that ends in .gif or .mp4 is needed")
    if suffix == ".gif" and args.seconds > LONGEST_GIF:
        raise ValueError(f"--seconds {args.seconds:g}: a GIF is at most {LONGEST_GIF} long")
    for module, package, needed in (("PIL", "pillow", True),
                                    ("imageio_ffmpeg", "imageio-ffmpeg", suffix == ".mp4")):
        if needed and not importlib.util.find_spec(module):
            raise ValueError(f"a {suffix} needs a package: pip install {package}")

def watch(args):
    """Writes the film; returns its path and the last Moment of each game."""
    check(args)
    agent, last = read_agent(args.run, args.seed), {}
    film = Film(agent, args.scale)
    out = Path(args.out or Path(args.run, f"step{agent.run.step}_seed{args.seed}.gif"))
    out.touch()  # an error comes now rather than after the game

    def pictures():
        start, end = (round(STEPS_PER_SECOND * x) for x in (args.start, args.start + args.seconds))
        for t, moment in enumerate(moments(agent, end, args.games)):
            last[moment.game] = moment
            picture = film.picture(moment)
            if t >= start:
                yield picture

    write(pictures(), film.size, out, args.fps)
    for game, moment in last.items():
        score = f"{moment.score:,.0f} after {moment.length:,} agent steps"
        print(f"game {game}: score {score}" if moment.over else
              f"game {game}, cut off by --seconds {args.seconds:g}: {score}, no final score")
    print(f"wrote {out}")
    return out, list(last.values())

def main():
    """The command line."""
    try:
        watch(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    main()
