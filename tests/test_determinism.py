"""The same seed and arguments give the same bits, however many threads step the environments.

With one thread of PyTorch's, and of a script of each kind with two.
"""

import pytest
from forked import KINDS, MANY_SEEDS, run, slow, small
from test_scripts import scalars_of

THREADS = """
import envpool
make = envpool.make
envpool.make = lambda *args, **kwargs: make(*args, **{**kwargs, "num_threads": COUNT})
"""


@pytest.mark.parametrize("name", slow(KINDS, "ppo_atari", "ppo_atari_2models"))
def test_the_same_seed_gives_the_same_bits(name, tmp_path):
    flags = [*small(name, 8), "--num-envs", "4", "--anneal-lr", "--checkpoint-interval", "0.25"]  # 4 iterations
    patch = THREADS
    if "mujoco" in name:
        flags += ["--eval-episodes", "1", "--eval-interval", "0.5"]  # an Atari game takes long
    if name == "ppo_mujoco":
        flags += ["--torch-threads", "2"]
    if name == "ppo_pfo_atari":
        patch += "import torch\ntorch.set_num_threads(2)\n"
    folders = [tmp_path / str(count) for count in (0, 1, 3)]  # 0 leaves the choice to envpool
    for folder in folders:
        folder.mkdir()
        code, said = run(name, folder, flags, patch.replace("COUNT", folder.name))
        assert code == 0, said
    first, *others = [sorted(folder.glob("runs/*")) for folder in folders]
    assert len(first) == (2 if name == MANY_SEEDS else 1)
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            files = sorted(path.name for path in mine.glob("checkpoints/*"))
            assert files == sorted(path.name for path in theirs.glob("checkpoints/*")) and len(files) == 7
            for file in files:
                assert (mine / "checkpoints" / file).read_bytes() == (theirs / "checkpoints" / file).read_bytes(), file
            one, two = scalars_of(mine), scalars_of(theirs)
            assert one.keys() == two.keys()
            for tag, points in one.items():
                assert tag.startswith(("time/", "charts/SPS", "charts/FPS")) or points == two[tag], tag
