"""What a task pays for uniformly random actions: the mean return and its 95 % bootstrap interval.

    python -m benchmark.random_policy --env-id Phoenix-v5 --episodes 200
    python -m benchmark.random_policy --env-id Ant-v4

The environment is ppo_pfo_atari.py's or ppo_mujoco.py's with its defaults, but for the reward, which is the game's own.
"""

import difflib
from dataclasses import dataclass

import numpy as np
from envpool.atari.registration import atari_game_list
from envpool.mujoco.gym.registration import gym_mujoco_envs

import ppo_mujoco
import ppo_pfo_atari
from benchmark.curves import bootstrap_interval
from common.arguments import check_range
from common.run import parse_args


@dataclass
class Args:
    env_id: str = "Phoenix-v5"
    """an Atari game or a MuJoCo task"""
    episodes: int = 200
    """games or episodes to play, one in each of as many environments"""
    seed: int = 1
    """seed of the actions and of the environments"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "episodes", low=1, high=1024)
    check_range(args, "seed", low=0, high=2**31 - 1)
    scripts = {f"{game.replace('_', '')}-v5": ppo_pfo_atari for game in atari_game_list}
    scripts |= {
        f"{task}-{version}".lower(): ppo_mujoco for task, versions, _ in gym_mujoco_envs for version in versions
    }
    script = scripts[difflib.get_close_matches(args.env_id.lower(), scripts, n=1, cutoff=0)[0]]
    env_args = script.Args(env_id=args.env_id)
    script.check_args(env_args)
    rng = np.random.default_rng(args.seed)
    envs = script.make_envs(env_args, args.episodes, rng.integers(2**31, size=args.episodes).tolist())
    envs.reset()
    returns, playing = np.zeros(args.episodes), np.arange(args.episodes, dtype=np.int32)
    while playing.size:
        if script is ppo_mujoco:
            low, high = envs.action_space.low, envs.action_space.high
            actions = rng.uniform(low, high, (len(playing), *low.shape))
        else:
            actions = rng.integers(envs.action_space.n, size=len(playing))
        _, rewards, terminated, truncated, _ = envs.step(actions, playing)
        returns[playing] += rewards
        playing = playing[~(terminated | truncated)]
    low, high = bootstrap_interval(returns, rng)
    interval = f"95 % interval {low:.0f} to {high:.0f}"
    print(f"{env_args.env_id}: random actions return {returns.mean():.0f}, {interval}, {args.episodes} episodes")
