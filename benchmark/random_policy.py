"""What a game pays for uniformly random actions: the mean return and its 95 % bootstrap interval.

    python -m benchmark.random_policy --env-id Phoenix-v5 --episodes 200

The environment is ppo_pfo_atari.py's with its defaults, but for the reward, which is the game's own.
"""

from dataclasses import dataclass

import numpy as np

import ppo_pfo_atari
from benchmark.curves import bootstrap_interval
from common.run import check_range, parse_args


@dataclass
class Args:
    env_id: str = "Phoenix-v5"
    """an Atari game"""
    episodes: int = 200
    """games to play, one in each of as many environments"""
    seed: int = 1
    """seed of the actions and of the environments"""


if __name__ == "__main__":
    args = parse_args(Args)
    check_range(args, "episodes", low=1, high=1024)
    check_range(args, "seed", low=0, high=2**31 - 1)
    env_args = ppo_pfo_atari.Args(env_id=args.env_id)
    ppo_pfo_atari.check_args(env_args)
    rng = np.random.default_rng(args.seed)
    envs = ppo_pfo_atari.make_envs(env_args, args.episodes, rng.integers(2**31, size=args.episodes).tolist())
    envs.reset()
    returns, playing = np.zeros(args.episodes), np.arange(args.episodes, dtype=np.int32)
    while playing.size:
        _, rewards, terminated, truncated, _ = envs.step(rng.integers(envs.action_space.n, size=len(playing)), playing)
        returns[playing] += rewards
        playing = playing[~(terminated | truncated)]
    low, high = bootstrap_interval(returns, rng)
    interval = f"95 % interval {low:.0f} to {high:.0f}"
    print(f"{env_args.env_id}: random actions return {returns.mean():.0f}, {interval}, {args.episodes} games")
