"""Whole episodes of a policy, in environments of their own, and a film of the first."""

import contextlib
import subprocess
import sys

import imageio.v2 as imageio
import numpy as np
import torch

RENDER = """
import contextlib, ctypes, sys
with contextlib.suppress(OSError):
    ctypes.CDLL("libEGL.so.1", mode=ctypes.RTLD_GLOBAL)
import envpool
envs = envpool.make(sys.argv[1], env_type="gymnasium", num_envs=1, seed=0, render_mode="rgb_array")
envs.reset()
envs.render(env_ids=[0])[0]
"""


def can_render(env_id):
    """Whether envpool can render ``env_id`` here, tried in a process of its own, which OpenGL's absence would end."""
    with contextlib.suppress(subprocess.TimeoutExpired):  # of a driver that hangs
        command = [sys.executable, "-c", RENDER, env_id]
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    return False


@torch.no_grad()
def play(make_envs, act, device, fps, seeds, greedy, video=None):
    """Returns and lengths (agent steps) of one whole episode for each of ``seeds``, two arrays.

    make_envs(num_envs, seeds, render_mode): a synchronous envpool.
    act(obs, elapsed, greedy, generator): the actions, NumPy, for the observations of the episodes in progress, which
    are ``elapsed`` (n,) agent steps into theirs; sampled by ``generator``, on ``device``, or ``greedy``.
    video: a path to record the first episode to, ``fps`` images a second. Training's random states stay as they are.
    """
    envs = make_envs(len(seeds), seeds, render_mode="rgb_array" if video else None)
    generator = torch.Generator(device).manual_seed(seeds[0])
    obs, _ = envs.reset()
    returns, lengths, playing = np.zeros(len(seeds)), np.zeros(len(seeds)), np.arange(len(seeds), dtype=np.int32)
    with contextlib.ExitStack() as stack:
        film = None
        if video:
            video.parent.mkdir(exist_ok=True)
            film = stack.enter_context(imageio.get_writer(video, fps=fps, macro_block_size=2))
        while playing.size:
            if film and playing[0] == 0:
                film.append_data(envs.render(env_ids=[0])[0])
            actions = act(obs, lengths[playing], greedy, generator)
            obs, rewards, terminated, truncated, _ = envs.step(actions, playing)
            returns[playing] += rewards
            lengths[playing] += 1
            ongoing = ~(terminated | truncated)
            obs, playing = obs[ongoing], playing[ongoing]
    envs.close()
    return returns, lengths
