"""Watch an agent play: a GIF or a video of the game, with what its network says beside the screen.

    pip install -e '.[watch]'
    python paper/watch.py runs/Breakout__a2c_proper__seed1__20260101-120000
    python paper/watch.py checkpoint.pt --games 3 --seconds 120 --seed 1 --out breakout.mp4

Beside the screen stand the policy that acts with the action it took, V(s), and the entropy of the
policy, both with their last ten seconds. The checkpoint, or run folder, may be of any of the five
scripts. soft_dqn.py acts epsilon-greedily, as in its evaluations; its V is that of its backup.

The agent sees the pictures that it was trained on. The screen comes from a second emulator with the
same settings, seeds and actions; each step is checked to be the same in both. With the run's own
--seed the first game is the one that the script scores with --evaluate and --eval-episodes 1.
"""
import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import a2c_naive  # noqa: E402
import a2c_proper  # noqa: E402
import natural_pg_damped  # noqa: E402
import pgql_equiv  # noqa: E402
import soft_dqn  # noqa: E402
from a2c_proper import FRAME_SKIP, Refused  # noqa: E402

SCRIPTS = {script.__name__: script for script in (a2c_naive, a2c_proper, soft_dqn, pgql_equiv,
                                                  natural_pg_damped)}
ARM = ("update", "backup", "parameterization", "solver", "value", "n_step", "regularizer", "tau")
STEPS_PER_SECOND = 60 // FRAME_SKIP  # agent steps in a second of the game


@dataclasses.dataclass
class Args:
    checkpoint: tyro.conf.Positional[str]  # checkpoint, or the run folder that it is in
    out: str = ""  # file to write, .gif or .mp4; default: <game>_<script>_seed<k>.gif
    seconds: float = 30.0  # at most so much of the game, 15 agent steps a second
    games: int = 1  # at most so many games
    seed: int = 0  # games and sampling noise derive from it
    scale: int = 2  # pixels of the film for one of the game's, each way
    fps: float = 15.0  # pictures per second, one for each agent step; 15 is real time


LIMITS = dict(seconds=(0.1, 36_000), games=(1, 1e6), seed=(0, 2**32 - 1), scale=(2, 8), fps=(1, 50))
LONGEST_GIF = 300  # seconds; a GIF is held in memory until it is written


# === the agent ===
class Agent(NamedTuple):
    """A checkpoint with the functions and classes of the script that made it."""

    script: object  # the module
    args: object  # the flags of the run
    step: int  # agent steps it was trained for
    envs: object  # the script's Atari, with one game
    decide: Callable  # s (1, 4, 84, 84) uint8, generator -> a (1,), pi (1, A), V (1,)
    acts: str  # how a comes from the network


def read_agent(path):
    """The agent of a checkpoint. Raises the Refused of a script if it is of no use."""
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        script = SCRIPTS[torch.load(file, "cpu", weights_only=True, mmap=True)["script"]]
    except Exception:  # what it is read_checkpoint will meet again, and say
        script = a2c_proper
    saved = script.read_checkpoint(path)
    args = script.Args(**(saved["args"] | dict(device="cpu")))
    envs = script.Atari(args, 1)
    net, decide, acts = player(script, args, envs.n_actions)
    net.to(memory_format=torch.channels_last)  # as in training, where it rounds in the same way
    try:
        net.load_state_dict(saved["net"])
    except (KeyError, ValueError, RuntimeError) as e:
        raise Refused(f"{saved['path']} does not fit this script and game") from e
    return Agent(script, args, saved["step"], envs, decide, acts)


def player(script, args, A):
    """The network that the script's `train` makes, with its `act` as Agent.decide, and its name."""
    kl = (getattr(args, "regularizer", "") or args.backup).endswith("kl")
    log_pi_bar = torch.full((A,), -math.log(A) if kl else 0.0)

    def greedy(s, generator):
        Q, epsilon = net(s), args.eval_epsilon
        tau = 0.0 if args.backup == "hard" else args.tau
        best = torch.nn.functional.one_hot(Q.argmax(-1), A)
        a = script.epsilon_greedy(Q, epsilon, generator)
        return a, (1 - epsilon) * best + epsilon / A, script.soft_value(Q, log_pi_bar, tau)

    def sampled(s, generator):
        log_pi, V = (net(s), net.V(s)) if script is natural_pg_damped else net(s)
        a = script.sample(log_pi, script.gumbel_noise(log_pi.shape, generator))
        return a, log_pi.exp(), V

    if script is soft_dqn:
        net = script.QNetwork(A)
        return net, greedy, f"epsilon-greedy {args.eval_epsilon:g}"
    if script is natural_pg_damped:
        net = script.PolicyAndValue(A, args.value)
    elif getattr(args, "parameterization", "") == "q":
        net = script.SoftQ(A, log_pi_bar, args.tau)
    else:
        net = script.ActorCritic(A)
    return net, sampled, "sampled from pi"


# === the game ===
class Moment(NamedTuple):
    """An agent step: what was seen, said, done and scored."""

    s: np.ndarray  # (4, 84, 84) uint8, as the agent saw it
    screen: np.ndarray  # (210, 160, 3) uint8, the same for the viewer
    V: float  # V(s)
    pi: np.ndarray  # (A,) the policy that acts
    entropy: float  # of pi, in nats
    a: int
    score: float  # of the game, with what a earned
    length: int  # agent steps of the game, with this one
    game: int  # from 1


def in_colour(envs):
    """A second emulator of the same game with the same settings; its pictures are the screen's."""
    screen = dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
    one = dict(num_envs=1, vectorization_mode="vector_entry_point")
    return gym.make_vec(envs.spec.id, **(envs.spec.kwargs | one | screen))


def moments(agent, seed, steps, games):
    """Yields a Moment for each agent step, until so many steps or games have been played."""
    seeds, envs, screens = agent.script.seeds, agent.envs, in_colour(agent.envs.envs)
    generator, game, rewards = torch.Generator(), 1, (0, 0)
    generator.manual_seed(int(seeds(seed, agent.step, "evaluation noise", 1)[0]))
    start = seeds(seed, agent.step, "evaluation", 1)
    s, (screen, info) = envs.reset(start), screens.reset(seed=start)
    for t in range(steps + 1):
        frames = int(envs.frame[0]), int(info["episode_frame_number"][0])
        if frames[0] != frames[1] or rewards[0] != rewards[1]:
            raise RuntimeError(f"the screen is not that of the game after {t} agent steps: "
                               f"frames {frames}, rewards {rewards}")
        if t == steps or game > games:
            return
        with torch.no_grad():
            a, pi, V = agent.decide(torch.from_numpy(s), generator)
        seen = s[0], screen[0, 0], float(V), pi[0].numpy(), float(torch.special.entr(pi).sum())
        s, reward, *_ = envs.step(a.numpy())
        screen, same, *_, info = screens.step(a.numpy())
        rewards = int(reward[0]), int(same[0])
        score, length = envs.ended[0][1:3] if envs.ended else (envs.score[0], envs.length[0])
        yield Moment(*seen, int(a), float(score), int(length), game)
        game += len(envs.ended)


# === the film ===
GROUND, GRID, DIM, TEXT = (22, 24, 29), (52, 56, 64), (150, 155, 165), (232, 234, 238)
BAR, TAKEN, CURVE = (84, 132, 190), (255, 160, 64), (120, 200, 150)
WIDTH, HEIGHT, MARGIN, TOP = 680, 508, 12, 74  # lengths are in pixels of a film with --scale 2
LEFT, RIGHT = 2 * MARGIN + 320, WIDTH - MARGIN  # of what stands beside the screen


class Film:
    """Draws Moments, one after another."""

    def __init__(self, agent, scale):
        from PIL import Image, ImageDraw, ImageFont
        self.Image, self.ImageDraw, args = Image, ImageDraw, agent.args
        self.scale, self.k = scale, scale / 2
        self.font = {n: ImageFont.load_default(n * self.k) for n in (11, 13, 20)}
        self.size = WIDTH * scale // 2, HEIGHT * scale // 2
        self.game = args.env_id.removeprefix("ALE/")[:-3]
        self.names = [action.name for action in agent.envs.envs.ale.get_action_set()]
        arm = [f"{name} {getattr(args, name)}" for name in ARM if hasattr(args, name)
               and not (name == "tau" and getattr(args, "backup", "") == "hard")]
        self.about = (f"{agent.script.__name__}: {', '.join(arm)}", f"after {agent.step:,} agent "
                      f"steps of training, seed {args.seed}; acts: {agent.acts}")
        self.V, self.entropy = [], []  # so far

    def picture(self, moment):
        """The next Moment as a picture, RGB."""
        picture, screen = self.Image.new("RGB", self.size, GROUND), moment.screen
        self.draw = self.ImageDraw.Draw(picture)
        large = screen.repeat(self.scale, 0).repeat(self.scale, 1)
        picture.paste(self.Image.fromarray(large), (int(MARGIN * self.k), int(TOP * self.k)))
        self.text(MARGIN, 8, self.game, TEXT, 20)
        self.text(WIDTH / 2, 13, f"game {moment.game}, step {moment.length:,}", DIM, anchor="ma")
        self.text(RIGHT, 8, f"score {moment.score:,.0f}", TEXT, 20, "ra")
        for i, line in enumerate(self.about):
            self.text(MARGIN, 34 + 16 * i, line, DIM)
        self.V.append(moment.V)
        self.entropy.append(moment.entropy)
        low, high = min(self.V), max(self.V)
        slack = max(0.0, 0.1 - (high - low)) / 2  # or a V that hardly moves would fill its frame
        middle = self.bars(moment) + MARGIN
        half = (HEIGHT - MARGIN - middle) / 2
        self.curve(middle, half, "V(s)", self.V, low - slack, high + slack)
        self.curve(middle + half, half, "entropy of pi, nats", self.entropy,
                   0, math.log(len(moment.pi)))
        return picture

    def text(self, x, y, text, colour, size=13, anchor="la"):
        self.draw.text((x * self.k, y * self.k), text, colour, self.font[size], anchor)

    def box(self, x0, y0, x1, y1, colour):
        x0, y0, x1, y1 = (round(x * self.k) for x in (x0, y0, x1, y1))
        if x1 > x0:
            self.draw.rectangle((x0, y0, x1 - 1, y1 - 1), colour)

    def bars(self, moment):
        """pi(. | s), a row for each action; returns where the rows end."""
        self.text(LEFT, TOP - 2, "policy pi(a | s)", DIM)
        row, x0, x1 = min(24, 252 / len(self.names)), LEFT + 112, RIGHT - 38
        for i, (name, p) in enumerate(zip(self.names, moment.pi.tolist())):
            y, colour = TOP + 18 + i * row, TAKEN if i == moment.a else TEXT
            self.text(LEFT + 10, y + row / 2, name, colour, 11, "lm")
            self.text(RIGHT, y + row / 2, f"{p:.3f}", colour, 11, "rm")
            self.box(x0, y + 2, x1, y + row - 2, GRID)
            self.box(x0, y + 2, x0 + (x1 - x0) * p, y + row - 2, TAKEN if i == moment.a else BAR)
            if i == moment.a:
                self.text(LEFT, y + row / 2, ">", TAKEN, 13, "lm")
        return TOP + 18 + row * len(self.names)

    def curve(self, top, height, name, values, low, high):
        """The last ten seconds of a value, the newest at the right, and its number."""
        last, right = 10 * STEPS_PER_SECOND, RIGHT - 50
        y0, y1 = top + 18, top + height - 6
        self.text(LEFT, top, name, DIM)
        self.text(right, top, f"{values[-1]:.3f}", CURVE, 13, "ra")
        self.box(LEFT, y0, right, y1, GRID)
        self.text(RIGHT, y0 - 2, f"{high:.2f}", DIM, 11, "ra")
        self.text(RIGHT, y1 + 2, f"{low:.2f}", DIM, 11, "rd")
        points = [(right - 4 - (right - LEFT - 8) * i / last,
                   y1 - 4 - (y1 - y0 - 8) * (v - low) / (high - low))
                  for i, v in enumerate(values[:-last - 1:-1])]
        points = [(x * self.k, y * self.k) for x, y in points]
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
    """Raises Refused on flags that make no sense or need what is not installed."""
    for name, (low, high) in LIMITS.items():
        if not low <= (value := getattr(args, name)) <= high:  # NaN fails this too
            raise Refused(f"--{name} {value} is not between {low:,} and {high:,}")
    suffix = Path(args.out).suffix if args.out else ".gif"
    if suffix not in (".gif", ".mp4"):
        raise Refused(f"--out {args.out}: a name that ends in .gif or .mp4 is needed")
    if suffix == ".gif" and args.seconds > LONGEST_GIF:
        raise Refused(f"--seconds {args.seconds:g}: a GIF is at most {LONGEST_GIF} long; use .mp4")
    if not importlib.util.find_spec("PIL"):
        raise Refused("drawing needs a package: pip install pillow")
    if suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        raise Refused(f"--out {args.out} needs a package: pip install imageio-ffmpeg")


def watch(args):
    """Writes the film; returns its path and the last Moment of each game."""
    check(args)
    agent = read_agent(args.checkpoint)
    film = Film(agent, args.scale)
    out = Path(args.out or f"{film.game}_{agent.script.__name__}_seed{args.seed}.gif")
    try:
        out.touch()  # rather than after the game
    except OSError as e:
        raise Refused(f"--out: cannot write to {out} ({e.strerror})") from e
    steps = round(args.seconds * STEPS_PER_SECOND)
    last = {}  # of each game

    def pictures():
        for moment in moments(agent, args.seed, steps, args.games):
            last[moment.game] = moment
            yield film.picture(moment)

    write(pictures(), film.size, out, args.fps)
    for game, moment in last.items():
        print(f"game {game}: score {moment.score:,.0f} after {moment.length:,} agent steps")
    print(f"wrote {out}")
    return out, list(last.values())


def main():
    """The command line."""
    try:
        watch(tyro.cli(Args, description=__doc__))
    except tuple(script.Refused for script in SCRIPTS.values()) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
