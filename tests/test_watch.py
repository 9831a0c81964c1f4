"""paper/watch.py: the film shows the game that is scored, and what the network says of it."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from util import ROOT, checkpoint, trained

sys.path.insert(0, str(ROOT / "paper"))
import watch

EPSILON, GAME = 0.3, 12  # agent steps until the time limit
VARIANTS = {
    "a2c_naive": dict(), "natural_pg_damped": dict(), "soft_dqn hard": dict(backup="hard"),
    "soft_dqn kl": dict(backup="soft-kl"),
    "pgql_equiv q": dict(parameterization="q", regularizer="kl"),
}

def script_of(name):
    return watch.importlib.import_module(name.split()[0])

def run_of(name, folder, **flags):
    """Trains a variant for a moment; returns the run's folder."""
    script, flags = script_of(name), flags | VARIANTS.get(name, {})
    if script.__name__ == "soft_dqn":
        flags["eval_epsilon"] = EPSILON
    return str(trained(script, folder, num_envs=1, total_timesteps=60, max_episode_frames=4 * GAME,
                       seed=5, **flags))

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a2c_proper."""
    return run_of("a2c_proper", tmp_path_factory.mktemp("a2c"))

def call(monkeypatch, *line):
    """The command line, in this process; returns the Moments that were drawn."""
    drawn, picture = [], watch.Film.picture
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["watch.py", *map(str, line)])
        patch.setattr(watch.Film, "picture", lambda *x: drawn.append(x[1]) or picture(*x))
        watch.main()
    return drawn

def evaluated(script, folder, monkeypatch, capsys):
    """What the script's own `act` saw and did in the one game that --evaluate scores."""
    seen, evaluate = [], script.Run.evaluate

    def spied(run, act):
        def spy(obs, noise):
            seen.append((obs.clone(), act(obs, noise)))
            return seen[-1][1]
        return evaluate(run, spy)

    monkeypatch.setattr(script.Run, "evaluate", spied)
    capsys.readouterr()
    flags = checkpoint(script, folder)["args"] | dict(evaluate=str(folder), eval_games=1)
    script.train(script.Args(**flags))
    return seen, float(capsys.readouterr().out.split("score ")[-1].split()[0])

def said(saved, script, obs):
    """V (T,) and pi (T, A) at obs (T, 4, 84, 84), from the weights, in other words."""
    args, name = saved["args"], script.__name__

    def linear(net, layer, h):
        return nn.functional.linear(h, *(saved[net][f"{layer}.{what}"] for what in (
            "weight", "bias")))

    def features(net, trunk="trunk"):
        h = obs / 255
        for i, stride in ((0, 4), (2, 2), (4, 1)):
            weight, bias = (saved[net][f"{trunk}.{i}.{what}"] for what in ("weight", "bias"))
            h = nn.functional.conv2d(h, weight, bias, stride).relu()
        return linear(net, f"{trunk}.7", h.flatten(1)).relu()

    if name == "natural_pg_damped":
        return (linear("V", "head", features("V")).squeeze(-1),
                linear("pi", "head", features("pi")).softmax(-1))
    dqn = name == "soft_dqn"
    if not dqn and args.get("parameterization") != "q":
        h = features("net")
        return linear("net", "V", h).squeeze(-1), linear("net", "pi", h).softmax(-1)
    tau = args["tau"]
    Q = linear("net", "Q.9" if dqn else "Q", features("net", "Q" if dqn else "trunk"))
    V = tau * (Q / tau).exp().sum(-1).log()
    V = V - tau * math.log(4) * (args.get("backup", args.get("regularizer"))[-2:] == "kl")
    if not dqn:
        return V, (Q / tau).softmax(-1)
    best = Q.max(-1)
    pi = torch.full_like(Q, EPSILON / 4).scatter_add(
        -1, best.indices[:, None], torch.full((len(Q), 1), 1 - EPSILON))
    return best.values if args["backup"] == "hard" else V, pi

@pytest.mark.parametrize("name", VARIANTS)
def test_the_film_is_the_game_that_evaluation_scores_with_what_the_network_says(
        name, tmp_path, monkeypatch, capsys):
    folder, script = run_of(name, tmp_path / "runs"), script_of(name)
    out = tmp_path / "film.gif"
    moments = call(monkeypatch, folder, "--seed", 5, "--out", out)
    told = capsys.readouterr().out
    seen, score = evaluated(script, folder, monkeypatch, capsys)
    assert len(moments) == len(seen) == GAME
    for moment, (obs, a) in zip(moments, seen):
        assert np.array_equal(moment.obs, obs[0].numpy()) and moment.a == int(a)
    assert moments[-1].score == score and moments[-1].over
    assert f"game 1: score {score:,.0f} after {GAME} agent steps" in told
    with torch.no_grad():
        obs = torch.from_numpy(np.stack([moment.obs for moment in moments]))
        V, pi = said(checkpoint(script, folder), script, obs)
    shown = torch.from_numpy(np.stack([m.pi for m in moments])).float()
    assert torch.allclose(shown.sum(-1), torch.ones(GAME), atol=1e-6)
    assert torch.allclose(shown, pi, atol=1e-5) and pi.std() > 1e-4
    assert [m.V for m in moments] == pytest.approx(V.tolist(), abs=1e-5) and V.std() > 0
    with Image.open(out) as film:
        assert film.n_frames == GAME and film.size == (680, 508)
        duration = 0
        for i, moment in enumerate(moments):
            film.seek(i)
            duration += film.info["duration"]
            shown = np.asarray(film.convert("RGB"), float)[74:494:2, 12:332:2]
            assert np.abs(shown - moment.screen).mean() < 3, "the screen is not where it belongs"
    assert abs(duration - 1000 * GAME / 15) < 10, "not in real time"

def test_screens_are_those_of_the_pictures_that_the_agent_saw(folder):
    """The newest of the four frames is the screen, gray and smaller; the others are not."""
    errors, entropies = [], []
    agent = watch.read_agent(folder, 1)
    film = watch.Film(agent, 2)
    for moment in watch.moments(agent, GAME, 1):
        assert moment.screen.shape == (210, 160, 3) and moment.screen.dtype == np.uint8
        gray = Image.fromarray(moment.screen).convert("L").resize((84, 84), Image.Resampling.BOX)
        errors.append([np.abs(frame - np.asarray(gray, float)).mean() for frame in moment.obs])
        film.picture(moment)
        entropies.append(-(moment.pi * np.log(moment.pi)).sum())
    errors = np.array(errors)[4:]
    assert (errors[:, 3] < 2).all() and (errors[:, 3] < errors[:, :3].min(1)).mean() > 0.7
    assert film.entropy == pytest.approx(entropies, abs=1e-6) and min(entropies) > 1

class Wrong:
    """An emulator that leaves the game: by its first seed, or by a reward at the third step."""
    def __init__(self, envs, how):
        self.envs, self.how, self.steps = envs, how, 0

    def reset(self, seed):
        return self.envs.reset(seed=seed + (self.how == "seed"))

    def step(self, a):
        self.steps += 1
        obs, reward, *rest = self.envs.step(a)
        return obs, reward + (self.how == "reward" and self.steps == 3), *rest

@pytest.mark.parametrize("how, steps", [("", 9), ("seed", 0), ("reward", 3)])
def test_a_screen_that_leaves_the_game_is_an_error(folder, monkeypatch, how, steps):
    in_color = watch.in_color
    monkeypatch.setattr(watch, "in_color", lambda envs: Wrong(in_color(envs), how))
    moments, seen = watch.moments(watch.read_agent(folder, 1), 9, 1), []
    if how:
        with pytest.raises(RuntimeError, match=f"not that of the game after {steps} agent steps"):
            seen.extend(moments)
    else:
        seen.extend(moments)
    assert len(seen) == steps

def test_films_end_after_games_or_seconds_and_seeds_differ(folder):
    agent = watch.read_agent(folder, 1)
    two, cut = (list(watch.moments(agent, *limits)) for limits in ((999, 2), (GAME + 5, 9)))
    other = list(watch.moments(watch.read_agent(folder, 2), 3, 1))
    assert [(m.game, m.length) for m in two] == [(g, t + 1) for g in (1, 2) for t in range(GAME)]
    assert [m.over for m in two] == 2 * ([False] * (GAME - 1) + [True]) and not cut[-1].over
    assert [(m.game, m.length) for m in cut] == [(m.game, m.length) for m in two[:GAME + 5]]
    assert all(np.array_equal(a.screen, b.screen) and a.a == b.a for a, b in zip(two, cut))
    assert any(a.a != b.a or not np.array_equal(a.obs, b.obs) for a, b in zip(two, other))

def test_default_name_scale_and_video(folder, tmp_path, monkeypatch, capsys):
    """The film lies in the run's folder, and a game that it cuts off has no score."""
    monkeypatch.chdir(tmp_path)
    assert len(call(monkeypatch, folder, "--start", 0.4, "--seconds", 0.2)) == 9
    out = capsys.readouterr().out
    assert "game 1, cut off by --seconds 0.2" in out and "game 1: score" not in out
    with Image.open(Path(folder, "step60_seed0.gif")) as film:
        assert film.n_frames == 3 and not list(tmp_path.iterdir())
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    call(monkeypatch, folder, "--seconds", 0.4, "--scale", 3, "--out", "x.mp4")
    assert ffmpeg.count_frames_and_secs("x.mp4") == (6, pytest.approx(0.4))
    assert next(ffmpeg.read_frames("x.mp4"))["size"] == (1020, 762)

BAD = {
    "nowhere": "nowhere: no checkpoint", "FOLDER --out x.avi": ".mp4 is", "FOLDER --out film":
    "a name that ends in", "FOLDER --out /proc/x/y.gif": "/proc/x/y.gif", "FOLDER --seconds 0":
    "--seconds 0.0 is not between", "FOLDER --seconds nan": "--seconds nan",
    "FOLDER --seconds 301": "a GIF is at most 300", "FOLDER --games 0": "--games 0 is not between",
    "FOLDER --seed -1": "--seed -1", "FOLDER --scale 1": "--scale 1", "FOLDER --fps 0": "--fps 0.0",
    "FOLDER --out x.mp4": "pip install imageio-ffmpeg", "FOLDER": "pip install pillow",
}

@pytest.mark.parametrize("line, text", BAD.items())
def test_bad_input_ends_with_one_sentence_and_exit_code_2(folder, line, text, tmp_path, monkeypatch,
                                                          capsys):
    monkeypatch.chdir(tmp_path)
    find_spec = watch.importlib.util.find_spec
    if "pip" in text:
        missing = "PIL" if "pillow" in text else "imageio_ffmpeg"
        monkeypatch.setattr(watch.importlib.util, "find_spec",
                            lambda name: None if name == missing else find_spec(name))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *line.replace("FOLDER", folder).split())
    out = capsys.readouterr().err
    assert stop.value.code == 2 and text in out and out.count("\n") == 1
    assert not list(tmp_path.iterdir())
