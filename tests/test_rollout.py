"""Every transition that a rollout stores is one that an environment made, across every kind of episode end."""

import importlib
from functools import partial

import ale_py
import envpool
import numpy as np
import pytest
import torch
from ale_py.roms import get_rom_path

from common.evaluation import play as play_episodes

script = importlib.import_module("ppo_pfo_atari")
FRAME_SKIP = 3


def uniform_policy(num_actions):
    """A policy that ignores what it sees, in the shape that ``rollout`` expects."""

    def act(obs, noise, all_layers):
        layer = obs.reshape(len(obs), -1)[:, :5].float()
        logits = torch.zeros(len(obs), num_actions)
        network = script.NetworkOutput(logits, layer, layer + 1, layer.repeat(1, 2))
        return network, script.sample(logits, noise)

    return act


def play(envs, obs, num_rollouts, num_actions, running, seed=0):
    """Some rollouts in a row, as the training loop makes them: observations, actions, rewards, dones, games."""
    generator = torch.Generator().manual_seed(seed)
    num_steps, num_envs = len(obs) - 1, obs.shape[1]
    for k in range(num_rollouts):
        noise = torch.empty((num_steps, num_envs, num_actions)).exponential_(generator=generator)
        transitions, games = script.rollout(envs, uniform_policy(num_actions), obs, noise, running, all_layers=True)
        assert torch.equal(transitions.actions, (-noise.log()).argmax(2))
        games = [(k * num_steps * num_envs + steps, ret, length) for steps, ret, length in games]
        yield obs.clone(), transitions, games
        obs[0] = obs[-1]


class ScriptedEnvs:
    """An envpool whose episodes end when and how its script says.

    Its observation carries environment, game, life, agent steps into the game, and the last action. The step after an
    end is envpool's own fake: the action is ignored, the reward is 0, and the observation is a new beginning.
    """

    ENDS = (("life", "terminated", "truncated"), ("truncated", "life", "life", "terminated"), ("terminated",))
    LENGTHS = (7, 4, 11)

    def __init__(self):
        self.num_envs = len(self.ENDS)
        self.game, self.life, self.time, self.action, self.ended = np.zeros((5, self.num_envs), dtype=int)
        self.played = []  # raw return and length of whole games

    def end_of(self, i):
        """What ends the life that environment ``i`` is in."""
        return self.ENDS[i][(self.game[i] + self.life[i]) % len(self.ENDS[i])]

    def observe(self, ids):
        obs = np.zeros((len(ids), 4, 84, 84), dtype=np.uint8)
        obs[:, 3, 83, :5] = np.stack([ids, self.game[ids], self.life[ids], self.time[ids], self.action[ids]], 1)
        return obs

    @staticmethod
    def reward(env, game, life, time, action):
        """Raw reward of ``action`` where an observation says ``env, game, life, time``."""
        return (3 * env + 5 * game + 7 * life + 2 * time + action) % 11 - 5

    def step(self, actions, ids=None):
        ids = np.arange(self.num_envs) if ids is None else ids
        raw, terminated, truncated, over = np.zeros((4, len(ids)))
        for k, (i, action) in enumerate(zip(ids, actions, strict=True)):
            if self.ended[i]:
                self.ended[i], self.action[i] = 0, 0
                continue
            raw[k] = self.reward(i, self.game[i], self.life[i], self.time[i], action)
            self.time[i] += 1
            self.action[i] = action
            if self.time[i] % self.LENGTHS[i]:
                continue
            end, self.ended[i] = self.end_of(i), 1
            terminated[k], truncated[k], over[k] = end != "truncated", end == "truncated", end == "terminated"
        obs = self.observe(ids)  # the true last one, before anything moves on
        for k, i in enumerate(ids):
            if terminated[k] and not over[k]:
                self.life[i] += 1
            elif self.ended[i]:
                self.game[i], self.life[i], self.time[i] = self.game[i] + 1, 0, 0
        info = {"reward": raw, "terminated": over.astype(np.int32)}
        return obs, np.sign(raw).astype(np.float32), terminated.astype(bool), truncated.astype(bool), info


@pytest.mark.parametrize("num_steps", [1, 5, 40])
def test_scripted_transitions_are_real(num_steps):
    envs = ScriptedEnvs()
    obs = torch.zeros((num_steps + 1, envs.num_envs, 84, 84, 4), dtype=torch.uint8)
    obs[0] = torch.from_numpy(envs.observe(np.arange(envs.num_envs))).permute(0, 2, 3, 1)
    ended, totals, logged, seen_ends = [], np.zeros((2, envs.num_envs)), [], set()
    for k, (seen, transitions, games) in enumerate(play(envs, obs, 120 // num_steps, 6, np.zeros((2, envs.num_envs)))):
        logged += games
        assert torch.equal(transitions.policy.features, seen[:-1].flatten(2)[:, :, :5].float())
        assert transitions.policy.all_preactivations.shape == (num_steps, envs.num_envs, 10)
        for t in range(num_steps):
            for i in range(envs.num_envs):
                env, game, life, time, _ = before = seen[t, i, 83, :5, 3].tolist()
                after = seen[t + 1, i, 83, :5, 3].tolist()
                action, done = transitions.actions[t, i].item(), bool(transitions.dones[t, i])
                raw = envs.reward(*before[:4], action)
                assert env == i and transitions.rewards[t, i].item() == np.sign(raw)
                totals[:, i] += raw, 1
                assert done == ((time + 1) % envs.LENGTHS[i] == 0)
                if not done:
                    assert after == [i, game, life, time + 1, action]
                    continue
                end = envs.ENDS[i][(game + life) % len(envs.ENDS[i])]
                seen_ends.add(end)
                assert after == ([i, game, life + 1, time + 1, 0] if end == "life" else [i, game + 1, 0, 0, 0])
                if end != "life":
                    ended.append(((k * num_steps + t + 1) * envs.num_envs, *totals[:, i]))
                    totals[:, i] = 0
    assert seen_ends == {"life", "terminated", "truncated"}
    assert logged == ended  # truncated games count, lost lives do not, and no return leaks into the next game


def first_observation(envs, num_steps):
    obs = torch.zeros((num_steps + 1, envs.num_envs, 84, 84, 4), dtype=torch.uint8)
    obs[0] = torch.from_numpy(envs.reset()[0]).permute(0, 2, 3, 1)
    return obs


@pytest.mark.parametrize("limit", [36_000, 50])
def test_real_transitions_match_single_environments(limit):
    """The same actions in environments that are played one by one and reset when they end."""
    settings = dict(frame_skip=FRAME_SKIP, repeat_action_probability=0.25, noop_max=1, use_fire_reset=False)
    settings |= dict(env_type="gymnasium", max_episode_steps=limit, reward_clip=True)
    seeds = [11, 5, 300]
    envs = envpool.make("Breakout-v5", num_envs=3, seed=seeds, **settings)
    num_actions = int(envs.action_space.n)
    parts = list(play(envs, first_observation(envs, 100), 8, num_actions, np.zeros((2, 3))))
    actions, rewards, dones = (
        torch.cat([getattr(p[1], name) for p in parts]) for name in ("actions", "rewards", "dones")
    )
    observations = torch.cat([p[0][:-1] for p in parts])
    games = []
    for i, seed in enumerate(seeds):
        single = envpool.make("Breakout-v5", num_envs=1, seed=[seed], **settings)
        obs, total = single.reset()[0], np.zeros(2)
        for t, action in enumerate(actions[:, i].tolist()):
            assert np.array_equal(observations[t, i].permute(2, 0, 1), obs[0]), f"environment {i}, step {t}"
            obs, reward, terminated, truncated, info = single.step(np.array([action]))
            total += info["reward"][0], 1
            assert rewards[t, i] == reward[0] and dones[t, i] == (terminated | truncated)[0]
            if terminated[0] or truncated[0]:
                games.append(((t + 1) * 3, *total))
                obs, total = single.reset()[0], np.zeros(2)
    assert len(games) >= 4
    assert sorted(games) == sorted(game for p in parts for game in p[2])


class Recorder:
    """A real envpool that keeps what each step of all environments returned."""

    def __init__(self, envs):
        self.envs, self.steps, self.extra = envs, [], []

    def step(self, actions, ids=None):
        result = self.envs.step(actions) if ids is None else self.envs.step(actions, ids)
        (self.steps if ids is None else self.extra).append(result)
        return result


def test_lost_lives_end_episodes_but_not_games():
    args = script.Args(env_id="Breakout-v5", episodic_life=True, fire_reset=True)
    envs = script.make_envs(args, 4, [1, 2, 3, 4], episodic_life=True, reward_clip=True)
    recorder = Recorder(envs)
    obs = first_observation(envs, 150)
    parts = list(play(recorder, obs, 8, int(envs.action_space.n), np.zeros((2, 4))))
    infos = [step[4] for step in recorder.steps]
    raw = np.stack([info["reward"] for info in infos])
    over = np.stack([info["terminated"] for info in infos]).astype(bool)
    lives = np.stack([info["lives"] for info in infos])
    dones = torch.cat([p[1].dones for p in parts]).numpy().astype(bool)
    # Every stored step moved its game on by one; a fake one would repeat the step before it, or stand at 0.
    elapsed = np.stack([info["elapsed_step"] for info in infos])
    assert np.array_equal(elapsed[1:], np.where(over[:-1], 0, elapsed[:-1]) + 1)
    assert recorder.extra and not any(reward.any() for _, reward, *_ in recorder.extra)
    assert dones.sum() > over.sum() > 0
    expected = []
    for i in range(4):
        begin = 0
        for t in np.flatnonzero(over[:, i]):
            expected.append((raw[begin : t + 1, i].sum(), t + 1 - begin))
            begin = t + 1
        for t in np.flatnonzero(dones[:-1, i] & ~over[:-1, i]):
            assert lives[t + 1, i] <= lives[t, i]  # the same game goes on: no life came back
    assert sorted(expected) == sorted((ret, length) for p in parts for _, ret, length in p[2])


@pytest.mark.parametrize("game", ["breakout", "phoenix"])
def test_envpool_gives_the_emulators_rewards(game):
    """Without sticky actions, 2000 steps earn what ale_py pays for the same actions after one no-op."""
    args = script.Args(env_id=f"{game.capitalize()}-v5", repeat_action_probability=0.0)
    envs = script.make_envs(args, 1, [0], reward_clip=True)
    ale = ale_py.ALEInterface()
    ale.setLoggerMode(ale_py.LoggerMode.Error)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(get_rom_path(game))

    def reset():
        ale.reset_game()
        ale.act(0)

    action_set = ale.getMinimalActionSet()
    assert len(action_set) == envs.action_space.n
    reset()
    obs = first_observation(envs, 2000)
    recorder = Recorder(envs)
    ((_, transitions, games),) = play(recorder, obs, 1, len(action_set), np.zeros((2, 1)))
    returns, total = [], 0.0
    for t, action in enumerate(transitions.actions[:, 0].tolist()):
        raw = 0.0
        for _ in range(args.frame_skip):
            raw += ale.act(action_set[action])
            if ale.game_over():
                break
        assert recorder.steps[t][4]["reward"][0] == raw, f"step {t}"
        assert transitions.rewards[t, 0] == np.sign(raw)
        assert bool(transitions.dones[t, 0]) == ale.game_over()
        total += raw
        if ale.game_over():
            returns.append(total)
            total = 0.0
            reset()
    assert transitions.rewards.any() and (returns or game == "phoenix")  # a game of Phoenix may last as long as this
    assert returns == [ret for _, ret, _ in games]


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluation_returns_the_games_own_score(greedy):
    """A game played again by hand with the same seed and noise: raw rewards, one whole game, no more."""
    args = script.Args(env_id="Boxing-v5", frame_skip=200)  # large steps, a short test, and a game that the clock ends
    torch.manual_seed(4)
    agent = script.Agent(18, args)
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.mul_(3)  # actions that depend on what is seen
    before = torch.get_rng_state()
    actor, make_envs = partial(script.choose, agent), partial(script.make_envs, args)
    returns, lengths = play_episodes(make_envs, actor, torch.device("cpu"), 60, [77], greedy)
    assert torch.equal(torch.get_rng_state(), before)
    settings = dict(frame_skip=200, repeat_action_probability=0.25, noop_max=1, use_fire_reset=False)
    env = envpool.make("Boxing-v5", env_type="gymnasium", num_envs=1, seed=[77], max_episode_steps=540, **settings)
    generator = torch.Generator().manual_seed(77)
    obs, total, steps, over = env.reset()[0], 0.0, 0, False
    while not over:
        with torch.no_grad():
            logits = agent.policy(torch.from_numpy(obs).permute(0, 2, 3, 1)).output
        noise = torch.empty_like(logits).exponential_(generator=generator)
        action = logits.argmax(1) if greedy else script.sample(logits, noise)
        obs, _, terminated, truncated, info = env.step(action.numpy())
        total, steps, over = total + info["reward"][0], steps + 1, (terminated | truncated)[0]
    assert (returns.tolist(), lengths.tolist()) == ([total], [steps]) and total


def test_each_environment_has_its_own_seed():
    args = script.Args(env_id="Breakout-v5")
    envs = script.make_envs(args, 3, [1, 1, 2])
    envs.reset()
    actions, same = np.random.default_rng(0).integers(0, 4, 300), np.ones(3, dtype=bool)
    for action in actions:
        obs = envs.step(np.full(3, action))[0]
        same &= (obs == obs[0]).all(axis=(1, 2, 3))
    assert same.tolist() == [True, True, False]  # sticky actions differ with the seed, and with nothing else
