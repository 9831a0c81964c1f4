"""What the emulator really does, game by game: each trap of the vector environment that matters."""
import ale_py.vector_env
import gymnasium as gym
import numpy as np
import pytest
import torch

GAMES = "ALE/Breakout-v5", "ALE/Qbert-v5"


def play(envs, seeds, steps, seed=0):
    """Random actions; returns what every step returned and the games that ended."""
    rng, rows = np.random.default_rng(seed), []
    first = envs.reset(np.asarray(seeds))
    for _ in range(steps):
        rows.append((*envs.step(rng.integers(0, envs.n_actions, envs.num_envs)), envs.ended))
    return first, rows


def test_sticky_actions_are_off_and_rewards_are_not_clipped(shared):
    """Bit-equal to an emulator whose sticky actions are off; Krull pays more than 1 a step."""
    args = shared.Args(env_id="ALE/Krull-v5")
    _, rows = play(shared.Atari(args, 2), [3, 4], 150)
    direct = ale_py.vector_env.AtariVectorEnv(
        "krull", 2, repeat_action_probability=0.0, reward_clipping=False, life_loss_info=True,
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    direct.reset(seed=np.array([3, 4]))
    rng, rewards = np.random.default_rng(0), []
    for obs, reward, *_ in rows:
        other = direct.step(rng.integers(0, 18, 2))
        assert np.array_equal(obs, other[0]) and np.array_equal(reward, other[1])
        rewards.append(reward)
    assert np.max(rewards) > 1
    sticky = shared.Args(env_id="ALE/Krull-v5", sticky=0.25)
    _, other = play(shared.Atari(sticky, 2), [3, 4], 150)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(rows, other))


@pytest.mark.parametrize("game", GAMES)
def test_a_lost_life_is_a_termination_but_not_the_end_of_the_game(shared, game):
    """Against a twin that does not know of lives: same pictures, same rewards, same true ends."""
    args = shared.Args(env_id=game)
    _, rows = play(shared.Atari(args, 3), [1, 2, 3], 500)
    twin = gym.make_vec(game, num_envs=3, vectorization_mode="vector_entry_point",
                        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
                        repeat_action_probability=0.0, reward_clipping=False)
    twin.reset(seed=np.array([1, 2, 3]))
    rng, score, lost, over = np.random.default_rng(0), np.zeros(3), 0, 0
    A = twin.single_action_space.n
    for obs, reward, terminated, _, _, ended in rows:
        other_obs, other_reward, ends, *_ = twin.step(rng.integers(0, A, 3))
        score += other_reward
        assert np.array_equal(obs, other_obs) and np.array_equal(reward, other_reward)
        assert [i for i, *_ in ended] == list(np.flatnonzero(ends))
        assert [s for _, s, *_ in ended] == list(score[ends])
        assert terminated[ends].all()
        lost, over, score = lost + (terminated & ~ends).sum(), over + ends.sum(), score * ~ends
    assert over > 0 and lost > over


def test_the_time_limit_truncates_and_gives_the_real_last_observation(shared):
    """final_obs of a cut game is what an uncut twin sees at that step, but for its newest plane:

    the emulator stops within the four frames and does not draw the last of them.
    """
    short = shared.Args(env_id="ALE/Pong-v5", max_episode_frames=400)
    envs, twin = shared.Atari(short, 2), shared.Atari(shared.Args(env_id="ALE/Pong-v5"), 2)
    _, rows = play(envs, [5, 6], 100)
    _, uncut = play(twin, [5, 6], 100)
    cut = [t for t, row in enumerate(rows) if row[3].any()]
    assert cut, "no game was cut"
    for t in cut:
        obs, _, terminated, truncated, final_obs, ended = rows[t]
        assert not terminated[truncated].any()
        assert np.array_equal(final_obs[truncated, :3], uncut[t][0][truncated, :3])
        assert not np.array_equal(obs[truncated, :3], uncut[t][0][truncated, :3])
        assert [i for i, *_ in ended] == list(np.flatnonzero(truncated))
        assert all(by_time_limit for *_, by_time_limit in ended)


@pytest.mark.parametrize("frames", [4, 8, 40])
def test_no_end_of_a_short_game_is_missed(shared, frames):
    """A new game may begin at a higher frame than that at which the last one was cut."""
    envs = shared.Atari(shared.Args(env_id="ALE/Breakout-v5", max_episode_frames=frames), 2)
    _, rows = play(envs, [1, 2], 60)
    cuts = sum(row[3].sum() for row in rows)
    ended = [game for row in rows for game in row[5]]
    assert cuts == len(ended) >= 2 * 60 // (frames // 4 + 1)
    assert all(length <= frames // 4 + 1 for _, _, length, _ in ended)


@pytest.mark.parametrize("bad", [-1, 4, 10**6])
def test_an_unknown_action_is_refused_instead_of_hanging(shared, bad):
    envs = shared.Atari(shared.Args(env_id="ALE/Breakout-v5"), 2)
    envs.reset(np.array([0, 1]))
    with pytest.raises(ValueError, match="not all in 0..3"):
        envs.step(np.array([0, bad]))
    envs.step(np.array([0, 3]))  # still alive


def test_observations_stay_what_they_were(shared):
    """The scripts keep views of the emulator's arrays; it must never write into them again."""
    envs = shared.Atari(shared.Args(env_id="ALE/Breakout-v5"), 1)
    kept = [torch.from_numpy(envs.reset(np.array([0])))]
    copies = [kept[0].clone()]
    for t in range(20):
        kept.append(torch.from_numpy(envs.step(np.array([t % 4]))[0]))
        copies.append(kept[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies))
    assert any(not torch.equal(a, b) for a, b in zip(kept, kept[1:]))


def test_no_environment_seed_is_used_twice(shared):
    """Over user seeds, checkpoints, training and evaluation."""
    drawn = np.concatenate([
        shared.seeds(seed, step, purpose, 16)
        for seed in range(5) for step in range(0, 20_000_000, 2_000_000)
        for purpose in ("training", "evaluation")])
    assert len(set(drawn.tolist())) == len(drawn) == 5 * 10 * 2 * 16
    assert drawn.min() >= 0 and drawn.max() < 2**31
    again = shared.seeds(0, 0, "training", 16)
    assert np.array_equal(again, drawn[:16])


@pytest.mark.parametrize("episodes, num_envs, played",
                         [(4, 4, [1, 1, 1, 1]), (5, 2, [3, 3]), (0, 2, [])])
def test_every_environment_plays_equally_many_games(shared, monkeypatch, episodes, num_envs,
                                                    played):
    args = shared.Args(env_id="ALE/Breakout-v5", num_envs=num_envs, eval_episodes=episodes)
    ended = []
    step = shared.Atari.step

    def watched(self, actions):
        result = step(self, actions)
        ended.extend(i for i, *_ in self.ended)
        return result

    monkeypatch.setattr(shared.Atari, "step", watched)

    def fire(obs, generator):
        return torch.randint(4, (len(obs),), generator=generator)

    cpu = torch.device("cpu")
    games = shared.play_games(fire, args, 0, cpu)
    assert len(games) == sum(played)
    for i, count in enumerate(played):
        assert ended.count(i) >= count
    assert games == shared.play_games(fire, args, 0, cpu), "not reproducible"
    if games:
        assert games != shared.play_games(fire, args, 1000, cpu), "seeds do not move"


def test_evaluation_cuts_stuck_games_and_counts_them(shared):
    args = shared.Args(env_id="ALE/Pong-v5", num_envs=2, eval_episodes=2, max_episode_frames=200)
    games = shared.play_games(lambda obs, _: torch.zeros(len(obs), dtype=torch.int64), args, 0,
                              torch.device("cpu"))
    assert [bool(cut) for *_, cut in games] == [True, True]
    assert all(length <= 50 for _, length, _ in games)
