"""Checkpoints from anywhere: what is damaged or hostile is refused in one line, and nothing in it is executed."""

import io
import pickle
import random
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from forked import run as run_process
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_mujoco as script
from common.checkpoint import BadCheckpoint, load_checkpoint, write_file
from common.run import library_versions, random_states, read_checkpoint, restore

TINY = {"hidden_sizes": (4, 4), "num_steps": 64, "minibatch_size": 32}
TYPES = {"kl_coef": float, "normalizer": dict, "episodes": int, "recent_returns": list}


def networks():
    import numpy as np

    args = script.Args(**TINY)
    script.check_args(args)
    agent = script.Agent(3, -np.ones(2), np.ones(2), args)
    return args, agent, script.make_optimizers(agent, args)


@pytest.fixture(scope="module")
def state():
    """What ppo_mujoco.py saves, of small networks that have taken a step."""
    import dataclasses

    import numpy as np

    torch.manual_seed(0)
    args, agent, optimizers = networks()
    sum(x.output.sum() for x in agent(torch.randn(5, 4))).backward()
    for optimizer in optimizers:
        optimizer.step()
    normalizer = script.Normalizer(np.zeros(3), np.ones(3), 1000)
    return {
        "script": "ppo_mujoco.py",
        "agent": agent.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "kl_coef": 0.0,
        "normalizer": normalizer.state_dict(),
        "iteration": 3,
        "global_step": 384,
        "episodes": 2,
        "recent_returns": [1.5, 2.0],
        "random_states": {
            **random_states(torch.device("cpu")),
            "numpy": np.random.default_rng(1).bit_generator.state,
        },
        "args": dataclasses.asdict(args),
        "versions": library_versions(),
        "git_revision": "unknown",
        "wandb_id": None,
    }


def saved(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


@pytest.fixture(scope="module")
def content(state):
    return saved(state)


def use(path):
    """Read and restore as a script does; True if the file was taken, False if it was refused in one line."""
    _, agent, optimizers = networks()
    import numpy as np

    wanted = script.Normalizer(np.zeros(3), np.zeros(3), 0).state_dict()
    try:
        restore(read_checkpoint(path, **TYPES), agent, optimizers, torch.device("cpu"), normalizer=wanted)
    except SystemExit as stop:
        assert stop.code == 2
        return False
    return True


def refusal(path, capsys):
    assert not use(path)
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"error: {path}: ") and printed.err.count("\n") == 1
    assert len(printed.err) < 1000
    return printed.err


def test_a_whole_checkpoint_is_taken(content, tmp_path, state):
    (tmp_path / "1.pt").write_bytes(content)
    assert use(tmp_path / "1.pt")
    checkpoint = load_checkpoint(tmp_path / "1.pt", **TYPES)
    assert checkpoint.pop("path") == tmp_path / "1.pt" and checkpoint.keys() == state.keys()
    for name, tensor in state["agent"].items():
        assert torch.equal(checkpoint["agent"][name], tensor)


class Code:
    """Pickles to a call of ``os.system``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def repacked(content, data_pkl=None, **options):
    """The archive ``content`` with another ``data.pkl`` and right checksums."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, data_pkl if data_pkl is not None and name.endswith("/data.pkl") else old.read(name))
    return packed.getvalue()


def data_pkl(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("archive/data.pkl")


# Builds (tensor, then a dict) what no writer of ours writes: a pickle for data.pkl, from the protocol's opcodes.
def calls(function, arguments):
    module, name = function
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


HOSTILE_PICKLES = {
    "code": calls(("posix", "system"), b"(X\x04\x00\x00\x00truet"),
    "builtins": calls(("builtins", "eval"), b"(X\x01\x00\x00\x001t"),
    "an import": calls(("antigravity", "geohash"), b")"),
    "a function of torch": calls(("torch._utils", "_rebuild_wrapper_subclass"), b")"),
    "a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "much memory for the memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "no end": b"\x80\x02" + b"(" * 1000,
    "nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused(name, content, tmp_path, capsys):
    (tmp_path / "1.pt").write_bytes(repacked(content, HOSTILE_PICKLES[name]))
    refusal(tmp_path / "1.pt", capsys)
    (tmp_path / "1.pt").write_bytes(HOSTILE_PICKLES[name])  # and as PyTorch's files were before they were archives
    refusal(tmp_path / "1.pt", capsys)


def test_code_is_not_run(state, tmp_path, capsys):
    mark = tmp_path / "executed"
    for save in (saved, pickle.dumps, lambda x: saved(OrderedDict(x)), lambda x: saved([x])):
        (tmp_path / "1.pt").write_bytes(save({**state, "episodes": Code(mark)}))
        refusal(tmp_path / "1.pt", capsys)
    assert not mark.exists()


def wrong_states(state):
    agent, args = state["agent"], state["args"]
    name = next(iter(agent))
    for key in [*state][:-1]:
        yield f"no {key}", {k: x for k, x in state.items() if k != key}
    for key in [*state][:-1]:
        yield f"{key} of another type", {**state, key: torch.zeros(2)}
        if state[key] != "":
            yield f"{key} None", {**state, key: None}
    yield "a list", [1, 2]
    yield "a tensor", torch.zeros(3)
    yield "another shape", {**state, "agent": {**agent, name: torch.zeros(3, 3)}}
    yield "another dtype", {**state, "agent": {**agent, name: agent[name].double()}}
    yield "one tensor more", {**state, "agent": {**agent, "more": torch.zeros(1)}}
    yield "one tensor less", {**state, "agent": {k: x for k, x in agent.items() if k != name}}
    yield "a tensor by number", {**state, "agent": {**agent, 3: torch.zeros(1)}}
    yield "a number for a tensor", {**state, "agent": {**agent, name: 1.0}}
    yield "an expanded tensor", {**state, "agent": {**agent, name: torch.zeros(1).expand(10**6, 10**6)}}
    yield "a sparse tensor", {**state, "agent": {**agent, name: torch.eye(3).to_sparse()}}
    yield "a tensor without numbers", {**state, "agent": {**agent, name: torch.empty(10**6, 10**6, device="meta")}}
    yield "negative iteration", {**state, "iteration": -1}
    yield "enormous iteration", {**state, "iteration": 10**100}
    yield "true iteration", {**state, "iteration": True}
    yield "args of tensors", {**state, "args": {**args, "seed": torch.zeros(1)}}
    yield "args of dicts", {**state, "args": {**args, "seed": {}}}
    yield "versions of numbers", {**state, "versions": {"torch": 1}}
    yield "one optimizer less", {**state, "optimizers": state["optimizers"][:1]}
    yield "optimizers of numbers", {**state, "optimizers": [1, 2]}
    one = state["optimizers"][0]
    yield "no moments of a weight", {**state, "optimizers": [{**one, "state": dict([*one["state"].items()][1:])}] * 2}
    for moments in ({"step": torch.tensor(1.0)}, {}, {**one["state"][0], "exp_avg": torch.zeros(7)}, 3):
        optimizers = [{**one, "state": {**one["state"], 0: moments}}, state["optimizers"][1]]
        yield f"moments {str(moments)[:20]}", {**state, "optimizers": optimizers}
    states = state["random_states"]
    yield "a short random state", {**state, "random_states": {**states, "cpu": torch.zeros(5, dtype=torch.uint8)}}
    yield "a random state of another dtype", {**state, "random_states": {**states, "cpu": states["cpu"].float()}}
    yield "no random state", {**state, "random_states": {}}
    yield "NumPy's state of another kind", {**state, "random_states": {**states, "numpy": {"state": 1}}}
    numbers = {**states["numpy"], "state": {"state": 2**200, "inc": -1}}
    yield "NumPy's state out of bounds", {**state, "random_states": {**states, "numpy": numbers}}
    yield "statistics of another shape", {**state, "normalizer": {**state["normalizer"], "mean": torch.zeros(9)}}
    yield "statistics without a limit", {**state, "normalizer": {**state["normalizer"], "time_limit": None}}


def test_wrong_states_are_refused(state, tmp_path, capsys):
    tried = 0
    for name, wrong in wrong_states(state):
        (tmp_path / "1.pt").write_bytes(saved(wrong))
        assert refusal(tmp_path / "1.pt", capsys), name
        tried += 1
    assert tried > 50


def test_claims_beyond_the_file_are_refused(content, state, tmp_path, capsys):
    path = tmp_path / "1.pt"
    path.write_bytes(repacked(content, compression=zipfile.ZIP_DEFLATED))  # may unpack to anything
    assert "claim more" in refusal(path, capsys)
    # The first tensor's storage claims one number more than it has, and one beyond all memory.
    pickled = data_pkl(content)
    count, tried = next(iter(state["agent"].values())).numel(), 0
    for claim in (count + 1, 2**31 - 1):
        for code in (b"K" + struct.pack("<B", count), b"M" + struct.pack("<H", count)):
            if code in pickled:
                path.write_bytes(repacked(content, pickled.replace(code, b"J" + struct.pack("<i", claim))))
                assert "claims" in refusal(path, capsys)
                tried += 1
    assert tried
    with open(path, "wb") as file:
        file.truncate(2**33)
    assert "bytes" in refusal(path, capsys)


def test_what_is_no_file_is_refused(tmp_path, capsys):
    import os

    assert "no such file" in refusal(tmp_path / "nothing.pt", capsys)
    assert "no such file" in refusal(tmp_path, capsys)
    os.mkfifo(tmp_path / "pipe.pt")  # would block whoever opens it
    assert "no such file" in refusal(tmp_path / "pipe.pt", capsys)


# Set while a file is read: what Python would do that no reader should. Audit hooks can't be taken away again.
watched = {"on": False, "seen": []}
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "shutil.", "os.remove")


def watch(event, args):
    if watched["on"] and (event.startswith(FORBIDDEN) or (event == "open" and "w" in str(args[1]))):
        watched["seen"].append((event, args))


def mutated(content, chance):
    """``content`` with one to four of the things that happen to files, or that somebody did to them."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, kind = chance.randrange(len(content) + 1), chance.randrange(6)
        length = min(int(2 ** chance.uniform(0, 12)), len(content))
        if kind == 0:
            content[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            content[at : at + length] = b""
        elif kind == 3:
            content[at:at] = chance.randbytes(length)
        elif kind == 4:
            start = chance.randrange(len(content) + 1)
            content[at : at + length] = content[start : start + length]
        else:
            del content[at:]
        if not content:
            break
    return bytes(content)


@pytest.mark.parametrize("part", ["file", "pickle"])
def test_mutated_files_are_refused_or_harmless(part, content, tmp_path, capsys):
    """1 500 mutated files, and 1 500 whose pickle alone was mutated, with checksums that are right all the same."""
    chance, path, taken = random.Random(part), tmp_path / "1.pt", 0
    sys.addaudithook(watch)
    pickled = data_pkl(content)
    for i in range(1500):
        if part == "file":
            path.write_bytes(mutated(content, chance))
        else:
            path.write_bytes(repacked(content, mutated(pickled, chance)))
        watched["on"] = True
        try:
            taken += use(path)
        finally:
            watched["on"] = False
        printed = capsys.readouterr()
        assert printed.err.count("\n") <= 1 and printed.out == "" and "Traceback" not in printed.err, (i, printed)
        assert watched["seen"] == [], i
    assert taken < (150 if part == "file" else 500)  # most mutations hit something


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint) as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["ppo_atari", "ppo_atari_2models", "ppo_pfo_atari", "ppo_mujoco", "ppo_mujoco_multiseed"]
)
def test_every_script_refuses_them(name, state, content, tmp_path):
    """As the only checkpoint of the run that --resume names."""
    folder = tmp_path / "runs" / "Hopper-v4__ppo_mujoco__1__1" / "checkpoints"
    folder.mkdir(parents=True)
    wrong = {"cut": content[:-100], "empty": b"", "code": repacked(content, HOSTILE_PICKLES["code"])}
    wrong |= {"shape": saved({**state, "agent": {**state["agent"], "half_width": torch.zeros(9)}})}
    for kind, file in wrong.items():
        (folder / "latest.pt").write_bytes(file)
        code, said = run_process(name, tmp_path, ["--resume", "runs/Hopper-v4__ppo_mujoco__1__1"])
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (kind, said)
    assert [path.name for path in Path(folder).parent.iterdir()] == ["checkpoints"]
    assert [path.name for path in folder.iterdir()] == ["latest.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    write_file(path, b"old")
    with pytest.raises(TypeError):
        write_file(path, "text where bytes are due")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]
