"""MuJoCo: every stored transition is one that a simulation made, and simulations are Gymnasium's."""

import importlib
from functools import partial

import envpool
import gymnasium
import numpy as np
import pytest
import torch

from common.evaluation import play as play_episodes

script = importlib.import_module("ppo_mujoco")


def ignorant(obs, noise):
    """Actions of a policy that ignores what it sees."""
    return (script.sample(torch.zeros(len(obs), 2 * noise.shape[1]), noise),)


def no_normalizer(obs_dim, time_limit=1000):
    return script.Normalizer(np.zeros(obs_dim), np.ones(obs_dim), time_limit)


def play(envs, normalizer, num_steps, num_rollouts):
    """Some rollouts in a row, as the training loop makes them: observations, transitions, episodes, running totals."""
    action_dim, num_envs = len(envs.action_space.low), len(envs.all_env_ids)
    generator, running = torch.Generator().manual_seed(0), np.zeros((2, num_envs))
    obs = torch.empty((num_steps + 1, num_envs, envs.observation_space.shape[0] + 1))
    obs[0] = normalizer(envs.reset()[0], running[1])
    for k in range(num_rollouts):
        noise = torch.randn((num_steps, num_envs, action_dim), generator=generator)
        transitions, ended = script.rollout(envs, ignorant, normalizer, obs, noise, running)
        yield obs.clone(), transitions, [(i, k * num_steps + step, *rest) for i, step, *rest in ended]
        obs[0] = obs[-1]


@pytest.mark.parametrize("task, limit", [("Hopper-v4", 1000), ("Hopper-v4", 15), ("HalfCheetah-v5", 40)])
def test_real_transitions_match_single_environments(task, limit):
    """The same actions in environments that are played one by one and reset when they end."""
    args, seeds = script.Args(env_id=task), [11, 5, 300]
    envs = script.make_envs(args, 3, seeds, max_episode_steps=limit)
    normalizer = no_normalizer(envs.observation_space.shape[0], limit)
    parts = list(play(envs, normalizer, 40, 3))
    actions, rewards, dones = (
        torch.cat([getattr(p[1], name) for p in parts]) for name in ("actions", "rewards", "dones")
    )
    observations = torch.cat([p[0][:-1] for p in parts])
    episodes, ends = [], set()
    for i, seed in enumerate(seeds):
        single = script.make_envs(args, 1, [seed], max_episode_steps=limit)
        obs, total, length = single.reset()[0], 0.0, 0
        for t, action in enumerate(actions[:, i].numpy()):
            expected = torch.from_numpy(obs[0]).float()
            assert torch.equal(observations[t, i, :-1], expected), f"environment {i}, step {t}"
            assert observations[t, i, -1].item() == pytest.approx(2 * length / limit - 1, abs=1e-6)
            obs, reward, terminated, truncated, info = single.step(action[None].astype(np.float64))
            total, length = total + np.float32(reward[0]), length + 1
            assert rewards[t, i] == np.float32(reward[0]) and dones[t, i] == (terminated | truncated)[0]
            assert info["elapsed_step"][0] == length
            if terminated[0] or truncated[0]:
                ends.add("truncated" if truncated[0] else "terminated")
                episodes.append((i, t + 1, pytest.approx(total, rel=1e-5, abs=1e-4), length))
                obs, total, length = single.reset()[0], 0.0, 0
    assert ends == {("Hopper-v4", 1000): {"terminated"}, ("Hopper-v4", 15): {"terminated", "truncated"}}.get(
        (task, limit), {"truncated"}
    )
    assert sorted(episodes, key=lambda e: e[:2]) == sorted((e for p in parts for e in p[2]), key=lambda e: e[:2])


def test_a_time_limit_ends_an_episode_like_a_fall():
    """No value is bootstrapped past it, and the time feature begins anew."""
    args = script.Args(env_id="HalfCheetah-v4")
    envs = script.make_envs(args, 2, [1, 2], max_episode_steps=10)
    ((obs, transitions, ended),) = play(envs, no_normalizer(17, 10), 25, 1)
    assert np.flatnonzero(transitions.dones[:, 0]).tolist() == [9, 19]
    assert obs[9:12, 0, -1].tolist() == pytest.approx([0.8, -1, -0.8])
    assert [(i, step, length) for i, step, _, length in ended] == [(i, t, 10) for t in (10, 20) for i in (0, 1)]
    values = torch.full((26, 2), 100.0)
    advantages, _ = script.gae(transitions.rewards, values[:-1], values[1:], transitions.dones, 0.99, 0.95)
    torch.testing.assert_close(advantages[9], transitions.rewards[9] - 100)


class BoxEnvs:
    """An envpool with a box of its own, which notes the actions that reach it."""

    def __init__(self, low, high):
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float64)
        self.actions = []

    def step(self, actions, ids=None):
        self.actions.append(actions)
        n = len(actions)
        return np.zeros((n, 3)), np.zeros(n), np.zeros(n, dtype=bool), np.zeros(n, dtype=bool), {}


def test_actions_fill_the_box_and_stay_in_it():
    low, high = np.array([-0.4, 0.0, -3.0]), np.array([0.4, 2.0, 5.0])
    envs = BoxEnvs(low, high)
    loc = torch.tensor([[-50.0, 0.0, 50.0], [0.2, -1.0, 0.0]])

    def act(obs, noise):
        return (script.sample(torch.cat([loc, loc * 0], dim=1), noise),)

    noise = torch.randn((200, 2, 3), generator=torch.Generator().manual_seed(0))
    obs = torch.zeros((201, 2, 4))
    transitions, _ = script.rollout(envs, act, no_normalizer(3), obs, noise, np.zeros((2, 2)))
    actions = np.stack(envs.actions)
    assert (actions > low).all() and (actions < high).all()
    assert actions[:, 0, 0].max() < -0.39 and actions[:, 0, 2].min() > 4.99
    stretched = transitions.actions.numpy() * (high - low) / 2 + (high + low) / 2
    np.testing.assert_allclose(actions, stretched, rtol=1e-12)
    z = script.unsquash(transitions.actions)
    scale = script.loc_and_scale(torch.zeros(1, 2))[1]
    torch.testing.assert_close(z[:, 1], loc[1] + noise[:, 1] * scale, rtol=1e-3, atol=1e-3)


def test_each_environment_has_its_own_seed():
    envs = script.make_envs(script.Args(), 3, [1, 1, 2])
    obs = envs.reset()[0]
    assert np.array_equal(obs[0], obs[1]) and not np.array_equal(obs[0], obs[2])


def test_observation_statistics():
    """Those of real observations alone, with uniform actions: recomputed with environments played one by one."""
    args = script.Args(env_id="Hopper-v4", obs_norm_steps=300)
    rng = np.random.default_rng(3)
    normalizer = script.random_statistics(args, [4, 9], rng)
    rng, seen = np.random.default_rng(3), []
    actions = np.stack([rng.uniform(-np.ones(3), np.ones(3), (2, 3)) for _ in range(300)])
    for i, seed in enumerate((4, 9)):
        env = script.make_envs(args, 1, [seed])
        obs = env.reset()[0]
        for action in actions[:, i]:
            seen.append(obs[0].copy())
            obs, _, terminated, truncated, _ = env.step(action[None])
            if (terminated | truncated)[0]:
                obs = env.reset()[0]
    np.testing.assert_allclose(normalizer.mean, np.mean(seen, axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(normalizer.std, np.std(seen, axis=0, ddof=1), rtol=1e-10)
    assert normalizer.time_limit == 1000
    x = normalizer(np.stack(seen[:5]), np.arange(5))
    assert x.dtype == torch.float32 and x.shape == (5, 12)
    np.testing.assert_allclose(x[:, :-1], (np.stack(seen[:5]) - normalizer.mean) / normalizer.std, rtol=1e-5, atol=1e-6)
    assert x[:, -1].tolist() == pytest.approx([-1, -0.998, -0.996, -0.994, -0.992])


def test_constant_dimensions_stay_finite():
    args = script.Args(env_id="Humanoid-v4", obs_norm_steps=100)
    normalizer = script.random_statistics(args, [1, 2], np.random.default_rng(0))
    assert (normalizer.std == 0).sum() > 20
    envs = script.make_envs(args, 2, [5, 6])
    ((obs, _, _),) = play(envs, normalizer, 50, 1)
    assert obs.isfinite().all()
    assert not obs[:, :, :-1][:, :, normalizer.std == 0][0].any()  # where it does not vary it is 0, not rounding noise


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("task", ["Humanoid-v4", "Ant-v4"])
def test_observations_are_gymnasiums(task):
    """Step by step from the same state with the same action, contact forces included."""
    envs = script.make_envs(script.Args(env_id=task), 1, [3])
    gym = gymnasium.make(task).unwrapped
    gym.reset(seed=0)
    num_positions, num_velocities = gym.model.nq, gym.model.nv
    rng, forces = np.random.default_rng(1), 0.0
    obs = envs.reset()[0][0]
    for _ in range(200):
        # What the observation leaves out is where on the endless plane the body is.
        state = np.concatenate([[0, 0], obs[: num_positions - 2 + num_velocities]])
        gym.set_state(state[:num_positions], state[num_positions:])
        action = rng.uniform(gym.action_space.low, gym.action_space.high)
        (obs,), (reward,), (terminated,), (truncated,), _ = envs.step(action[None])
        expected, expected_reward, expected_end, _, _ = gym.step(action)
        np.testing.assert_allclose(obs, expected, rtol=5e-3, atol=5e-3)
        # Two versions of MuJoCo solve a contact a little differently; a millimetre in 0.05 s is 0.02 of forward reward.
        assert reward == pytest.approx(expected_reward, abs=0.1) and terminated == expected_end
        forces = max(forces, np.abs(expected[292:]).max(initial=0))
        if terminated or truncated:
            obs = envs.step(np.zeros((1, len(action))), np.array([0], dtype=np.int32))[0][0]
    assert forces > 100 or task == "Ant-v4"  # Gymnasium's Ant-v4 leaves the forces out


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluation_returns_an_episodes_own_return(greedy):
    """An episode played again by hand with the same seed and noise: one whole episode, no more."""
    args = script.Args(env_id="Hopper-v4")
    torch.manual_seed(4)
    agent = script.Agent(11, -np.ones(3), np.ones(3), args)
    normalizer = script.random_statistics(script.Args(obs_norm_steps=50), [1], np.random.default_rng(0))
    before = torch.get_rng_state()
    actor = partial(script.choose, agent, normalizer, (-np.ones(3), np.ones(3)))
    returns, lengths = play_episodes(partial(script.make_envs, args), actor, torch.device("cpu"), 50, [77], greedy)
    assert torch.equal(torch.get_rng_state(), before)
    env = envpool.make("Hopper-v4", env_type="gymnasium", num_envs=1, seed=[77])
    generator = torch.Generator().manual_seed(77)
    obs, total, steps, over = env.reset()[0], 0.0, 0, False
    while not over:
        with torch.no_grad():
            loc, scale = script.loc_and_scale(agent.policy(normalizer(obs, np.array([steps]))).output)
        noise = torch.empty_like(loc).normal_(generator=generator)
        action = script.squash(loc if greedy else torch.addcmul(loc, scale, noise))
        obs, reward, terminated, truncated, _ = env.step(action.double().numpy())
        total, steps, over = total + reward[0], steps + 1, (terminated | truncated)[0]
    assert lengths.tolist() == [steps] and returns.tolist() == pytest.approx([total])


def test_evaluated_episodes_are_independent():
    """Of several at once, each is what it is alone: greedy actions depend on its own observations alone."""
    args = script.Args(env_id="Hopper-v4")
    torch.manual_seed(4)
    agent = script.Agent(11, -np.ones(3), np.ones(3), args)
    normalizer = script.random_statistics(script.Args(obs_norm_steps=50), [1], np.random.default_rng(0))
    actor, make_envs = (
        partial(script.choose, agent, normalizer, (-np.ones(3), np.ones(3))),
        partial(script.make_envs, args),
    )
    evaluate = lambda *seeds: play_episodes(make_envs, actor, torch.device("cpu"), 50, list(seeds), True)  # noqa: E731
    returns, lengths = evaluate(5, 6, 7, 8)
    assert len({*lengths.tolist()}) > 1
    for seed, ret, length in zip((5, 6, 7, 8), returns, lengths, strict=True):
        assert evaluate(seed)[1].tolist() == [length] and evaluate(seed)[0].tolist() == pytest.approx([ret], rel=1e-4)


def test_nan_that_a_reset_writes_over_is_seen():
    """A NaN ends the episode, as simulations do: it stays in the observation, where the reset's would stand."""

    class Broken:
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), dtype=np.float64)

        def step(self, actions, ids=None):
            n = len(actions)
            obs = np.full((n, 2), np.nan) if ids is None else np.zeros((n, 2))
            return obs, np.zeros(n), np.full(n, ids is None), np.zeros(n, dtype=bool), {}

    obs = torch.zeros((2, 3, 3))
    transitions, _ = script.rollout(Broken(), ignorant, no_normalizer(2), obs, torch.zeros((1, 3, 1)), np.zeros((2, 3)))
    assert obs[0].isfinite().all() and obs[1, :, :2].isnan().all() and transitions.rewards.isfinite().all()
