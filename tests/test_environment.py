"""What the emulator really does, game by game: each trap of the vector environment that matters."""
from typing import NamedTuple

import ale_py.vector_env
import gymnasium as gym
import numpy as np
import pytest
import torch

from util import TINY

class Step(NamedTuple):
    obs: torch.Tensor
    r: torch.Tensor
    terminated: torch.Tensor
    truncated: torch.Tensor
    last: torch.Tensor | None  # the last observations of the games that the time limit cut
    ended: list

def atari(shared, num_envs, **flags):
    return shared.Atari(shared.Args(**dict(device="cpu", threads=1) | flags), num_envs)

def play(envs, seeds, steps, seed=0):
    """Random actions; returns what every step returned and the games that ended with it."""
    rng, played = np.random.default_rng(seed), []
    envs.reset(np.asarray(seeds))
    for _ in range(steps):
        envs.send(torch.from_numpy(rng.integers(0, envs.n_actions, len(seeds))))
        envs.ended = []
        played.append(Step(*envs.recv(), envs.ended))
    return played

def test_sticky_actions_are_off_and_rewards_are_not_clipped(shared):
    """Bit-equal to an emulator whose sticky actions are off; Krull pays more than 1 a step."""
    played = play(atari(shared, 2, env_id="ALE/Krull-v5"), [3, 4], 150)
    direct = ale_py.vector_env.AtariVectorEnv(
        "krull", 2, repeat_action_probability=0.0, reward_clipping=False, life_loss_info=True,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    direct.reset(seed=np.array([3, 4]))
    rng = np.random.default_rng(0)
    for step in played:
        obs, reward, *_ = direct.step(rng.integers(0, 18, 2))
        assert np.array_equal(step.obs, obs) and np.array_equal(step.r, reward)
    assert max(step.r.max() for step in played) > 1
    sticky = play(atari(shared, 2, env_id="ALE/Krull-v5", sticky=0.25), [3, 4], 150)
    assert any(not torch.equal(a.obs, b.obs) for a, b in zip(played, sticky))

@pytest.mark.parametrize("game", ["ALE/Breakout-v5", "ALE/Qbert-v5"])
def test_a_lost_life_is_a_termination_but_not_the_end_of_the_game(shared, game):
    """Against a twin that does not know of lives: same pictures, same rewards, same true ends."""
    played = play(atari(shared, 3, env_id=game), [1, 2, 3], 500)
    twin = gym.make_vec(game, num_envs=3, vectorization_mode="vector_entry_point",
                        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
                        repeat_action_probability=0.0, reward_clipping=False)
    twin.reset(seed=np.array([1, 2, 3]))
    rng, score, length, lost, over = np.random.default_rng(0), *np.zeros((2, 3)), 0, 0
    A = twin.single_action_space.n
    for step in played:
        obs, reward, ends, *_ = twin.step(rng.integers(0, A, 3))
        score, length = score + reward, length + 1
        assert np.array_equal(step.obs, obs) and np.array_equal(step.r, reward)
        assert step.ended == [(i, score[i], length[i]) for i in np.flatnonzero(ends)]
        terminated = step.terminated.numpy()
        assert terminated[ends].all() and step.last is None
        lost, over = lost + (terminated & ~ends).sum(), over + ends.sum()
        score, length = score * ~ends, length * ~ends
    assert over > 0 and lost > over

def test_the_time_limit_truncates_and_gives_the_real_last_observation(shared):
    """It is what an uncut twin sees at that step, but for its newest plane:

    the emulator stops within the four frames and does not draw the last of them.
    """
    played = play(atari(shared, 2, max_episode_frames=400), [5, 6], 100)
    uncut = play(atari(shared, 2), [5, 6], 100)
    cut = [t for t, step in enumerate(played) if step.truncated.any()]
    assert cut, "no game was cut"
    for t, step in enumerate(played):
        assert (step.last is not None) == (t in cut) == bool(step.ended)
        if t in cut:
            twin = uncut[t].obs[step.truncated, :3]
            assert not step.terminated[step.truncated].any()
            assert torch.equal(step.last[:, :3], twin)
            assert not torch.equal(step.obs[step.truncated, :3], twin)
            assert [i for i, *_ in step.ended] == step.truncated.nonzero().flatten().tolist()

def test_a_life_lost_in_the_step_that_the_limit_cuts_is_lost(shared):
    """Nothing is paid for what would have followed; the game is over all the same."""
    free = play(atari(shared, 1, env_id="ALE/Breakout-v5"), [1], 60)
    t = next(t for t, step in enumerate(free) if step.terminated[0])
    cut = play(atari(shared, 1, env_id="ALE/Breakout-v5", max_episode_frames=4 * t + 4), [1], t + 1)
    assert cut[-1].terminated[0] and not cut[-1].truncated[0] and cut[-1].last is None
    assert [len(step.ended) for step in cut] == t * [0] + [1] and not free[t].ended

@pytest.mark.parametrize("frames", [4, 8, 40])
def test_no_end_of_a_short_game_is_missed(shared, frames):
    """A new game may begin at a higher frame than that at which the last one was cut."""
    played = play(atari(shared, 2, env_id="ALE/Breakout-v5", max_episode_frames=frames), [1, 2], 60)
    ended = [game for step in played for game in step.ended]
    assert sum(step.truncated.sum() for step in played) == len(ended) >= 120 // (frames // 4 + 1)
    assert all(length <= frames // 4 + 1 for _, _, length in ended)

@pytest.mark.parametrize("bad", [-1, 4, 10**6])
def test_an_unknown_action_is_refused_instead_of_hanging(shared, bad):
    envs = atari(shared, 2, env_id="ALE/Breakout-v5")
    envs.reset(np.array([0, 1]))
    with pytest.raises(AssertionError):
        envs.send(torch.tensor([0, bad]))
    envs.send(torch.tensor([0, 3]))
    envs.recv()  # still alive

def test_observations_stay_what_they_were(shared):
    """The scripts keep views of the emulator's arrays; it must never write into them again."""
    envs = atari(shared, 1, env_id="ALE/Breakout-v5")
    kept = [envs.reset(np.array([0]))]
    copies = [kept[0].clone()]
    for t in range(20):
        envs.send(torch.tensor([t % 4]))
        kept.append(envs.recv()[0])
        copies.append(kept[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))
    assert any(not torch.equal(a, b) for a, b in zip(kept, kept[1:]))

class Stub:
    """A run of which only seeds() is wanted."""
    def __init__(self, seed, step):
        self.args, self.step = type("Args", (), dict(seed=seed)), step

def test_no_environment_seed_is_used_twice(shared):
    """Over user seeds, checkpoints, training and evaluation."""
    drawn = [shared.Run.seeds(Stub(seed, step), purpose, 16)
             for seed in range(5) for step in range(0, 20_000_000, 2_000_000)
             for purpose in (b"games", b"evaluation")]
    every = np.concatenate(drawn)
    assert len(set(every.tolist())) == len(every) == 5 * 10 * 2 * 16
    assert every.min() >= 0 and every.max() < 2**31, "the emulator takes no others"
    assert np.array_equal(shared.Run.seeds(Stub(0, 0), b"games", 16), drawn[0])

@pytest.fixture
def evaluation(shared, tmp_path, monkeypatch):
    """Evaluates a policy of random actions; returns the row and the games in order of their end."""
    def evaluate(folder, step=400, **flags):
        args = shared.Args(**TINY | dict(runs_dir=str(tmp_path / folder)) | flags)
        run, games = shared.Run(args), []
        run.step = step
        monkeypatch.setattr(run, "write", lambda what, log, **row: games.append(row))
        recv = shared.Atari.recv

        def watched(self):
            before = len(self.ended)
            result = recv(self)
            games.extend(self.ended[before:])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(shared.Atari, "recv", watched)
            run.evaluate(lambda obs, noise: noise.argmax(-1))
        return games.pop(), games

    return evaluate

def test_every_environment_plays_one_full_game_and_the_first_of_each_counts(evaluation):
    """Games of Breakout by random actions have 130 to 400 steps: some begin a second one."""
    row, games = evaluation("a", eval_games=8, max_episode_frames=108_000)
    first = {i: game for i, *game in reversed(games)}
    score, length = zip(*first.values())
    assert sorted(first) == list(range(8)) and len(games) > 8
    assert row["games"] == 8 and row["score_mean"] == np.mean(score)
    assert row["score_std"] == np.std(score) and row["length_mean"] == np.mean(length)
    assert (row["score_min"], row["score_max"]) == (min(score), max(score))

def test_an_evaluation_cuts_stuck_games_and_has_seeds_of_its_step(evaluation):
    row, games = evaluation("a", eval_games=2, max_episode_frames=200)
    assert row["length_mean"] <= 50 and len(games) == 2
    assert evaluation("b", eval_games=2, max_episode_frames=200) == (row, games)
    assert evaluation("c", step=800, eval_games=2, max_episode_frames=200)[1] != games
