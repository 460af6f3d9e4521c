"""Checkpoints from anywhere: what is damaged or hostile is refused in one line, and nothing in it is executed."""

import contextlib
import importlib
import io
import pickle
import random
import resource
import runpy
import struct
import sys
import time
import zipfile
from collections import OrderedDict

import pytest
import torch
from forked import ROOT, SCRIPTS, slow
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
    "eight gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".",
    "much memory for the memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "no end": b"\x80\x02" + b"(" * 1000,
    "nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "nothing": b"",
    "text": b"hello",
}


def test_opcodes_that_allocate_are_unknown(content, tmp_path, capsys):
    """A bytearray would be filled with zeros before the file is read on."""
    (tmp_path / "1.pt").write_bytes(repacked(content, HOSTILE_PICKLES["eight gigabytes"]))
    assert "opcode 150" in refusal(tmp_path / "1.pt", capsys)


def string(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


# By reference, a few bytes become a tuple of 2**100 items, and a number of 250 bytes a shape of 100 000 of them.
NESTED = b"(t" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))
LONG = b"\x8a\xfa" + b"\x7f" * 250
LONGS = LONG + b"q\x00" + b"h\x00" * 10**5
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = b"(" + string("storage") + b"ctorch\nByteStorage\n" + string("x") + string("cpu") + b"K\x05tQ"
EXPLODING = {
    "a nested key": b"\x80\x02}" + NESTED + b"Ns.",
    "nested keys": b"\x80\x02}(" + NESTED + b"NNNu.",
    "a nested storage": b"\x80\x02" + STORAGE.replace(string("x"), NESTED) + b".",
    "a nested kind": b"\x80\x02" + STORAGE.replace(string("storage"), NESTED) + b".",
    "a nested count": b"\x80\x02" + STORAGE.replace(b"K\x05", NESTED) + b".",
    "a nested shape": b"\x80\x02" + TENSOR + STORAGE + b"K\x00" + NESTED + NESTED + b"\x89}tR.",
    "a nested value": b"\x80\x02}" + string("script") + NESTED + b"s.",
    "nested attributes": b"\x80\x02ccollections\nOrderedDict\n)R" + NESTED + b"b.",
    "a nested argument": b"\x80\x02ccollections\nOrderedDict\n" + NESTED + b"R.",
    "an enormous shape": b"\x80\x02"
    + TENSOR
    + STORAGE
    + b"K\x00("
    + LONG
    + b"q\x00"
    + b"h\x00" * 10**5
    + b"t)\x89}tR.",
    "an enormous offset": b"\x80\x02" + TENSOR + STORAGE + LONG + b"))\x89}tR.",
    "colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(10**5))
    + b"u.",
}


@pytest.mark.parametrize("name", EXPLODING)
def test_small_files_that_explode_are_refused_at_once(name, content, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "1.pt", "w") as archive:
        archive.writestr("archive/data.pkl", EXPLODING[name])
        archive.writestr("archive/data/x", bytes(5))
    start = time.process_time()
    refusal(tmp_path / "1.pt", capsys)
    assert time.process_time() - start < 5


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
    """Checkpoints with one thing wrong, by what it is."""
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
    yield "one optimizer less", {**state, "optimizers": state["optimizers"][:-1]}
    yield "optimizers of numbers", {**state, "optimizers": [1, 2]}
    one, more = state["optimizers"][0], state["optimizers"][1:]
    fewer = {key: x for key, x in one["state"].items() if key}
    yield "no moments of a weight", {**state, "optimizers": [{**one, "state": fewer}, *more]}
    for moments in ({"step": torch.tensor(1.0)}, {}, {**one["state"][0], "exp_avg": torch.zeros(7)}, 3):
        optimizers = [{**one, "state": {**one["state"], 0: moments}}, *more]
        yield f"moments {str(moments)[:20]}", {**state, "optimizers": optimizers}
    states = state["random_states"]
    yield "a short random state", {**state, "random_states": {**states, "cpu": torch.zeros(5, dtype=torch.uint8)}}
    yield "a random state of another dtype", {**state, "random_states": {**states, "cpu": states["cpu"].float()}}
    yield "no random state", {**state, "random_states": {}}
    yield "NumPy's state of another kind", {**state, "random_states": {**states, "numpy": {"state": 1}}}
    numbers = {**states["numpy"], "state": {"state": 2**200, "inc": -1}}
    yield "NumPy's state out of bounds", {**state, "random_states": {**states, "numpy": numbers}}
    yield "no NumPy state", {**state, "random_states": {"cpu": states["cpu"]}}
    yield "returns of text", {**state, "recent_returns": ["x"]}
    yield "a coefficient beyond float32", {**state, "kl_coef": 1e300}
    yield "a coefficient that is no number", {**state, "kl_coef": float("nan")}
    yield "a step that is not the iteration's", {**state, "global_step": state["global_step"] + 1}
    yield "endless args", {**state, "args": {**args, "hidden_sizes": (1,) * 10**5}}
    yield "a weight that is not finite", {**state, "agent": {**agent, name: agent[name] + float("inf")}}
    graph = {key: x.clone().requires_grad_(x.is_floating_point()) for key, x in one["state"][0].items()}
    yield "moments with a graph", {**state, "optimizers": [{**one, "state": {**one["state"], 0: graph}}, *more]}
    if "normalizer" in state:
        yield "normalizer's networks of 40 GB", {**state, "args": {**args, "hidden_sizes": (100_000, 100_000)}}
        for what, wrong in {
            "of another shape": {"mean": torch.zeros(9)},
            "without a limit": {"time_limit": None},
            "with an enormous limit": {"time_limit": 2**1000},
            "with a limit of 0": {"time_limit": 0},
            "with a graph": {"std": state["normalizer"]["std"].clone().requires_grad_()},
            "that are not finite": {"std": state["normalizer"]["std"] * float("nan")},
        }.items():
            yield f"normalizer {what}", {**state, "normalizer": {**state["normalizer"], **wrong}}


def test_wrong_states_are_refused(state, tmp_path, capsys):
    tried = 0
    for name, wrong in wrong_states(state):
        if name in ("a step that is not the iteration's", "normalizer's networks of 40 GB"):
            continue  # as only the arguments tell
        (tmp_path / "1.pt").write_bytes(saved(wrong))
        assert refusal(tmp_path / "1.pt", capsys), name
        tried += 1
    assert tried > 60


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
    """500 mutated files, and 500 whose pickle alone was mutated, with checksums that are right all the same."""
    chance, path, taken = random.Random(part), tmp_path / "1.pt", 0
    sys.addaudithook(watch)
    watched.update(on=True, seen=[])
    path.write_bytes(content)
    assert watched["seen"]  # it does see
    watched.update(on=False, seen=[])
    pickled = data_pkl(content)
    for i in range(500):
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
    assert taken < (50 if part == "file" else 166)  # most mutations hit something


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint) as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)


def state_of(name, state):
    """What a script saves of a run of three iterations at its smallest, made like ``state``."""
    module = importlib.import_module(name)
    flags = {"num_envs": 2, "num_steps": 8, "minibatch_size": 16, "total_timesteps": 10**4}
    if "mujoco" in name:
        flags["hidden_sizes"] = (4, 4)
    args = module.Args(**flags)
    module.check_args(args)
    if "mujoco" in name:
        space = module.envpool.make_spec(args.env_id)
        low, high = space.action_space.low, space.action_space.high
        agent = module.Agent(space.observation_space.shape[0], low, high, args)
        mean = torch.zeros(space.observation_space.shape[0], dtype=torch.float64)
        own = {"script": "ppo_mujoco.py", "normalizer": {"mean": mean, "std": mean + 1, "time_limit": 1000}}
    else:
        agent = module.Agent(8, args)
        own = {"script": f"{name}.py", "num_actions": 8}
        state = {key: x for key, x in state.items() if key != "normalizer"}
    optimizers = module.make_optimizers(agent, args)
    for x in agent.parameters():
        x.grad = torch.zeros_like(x)
    for optimizer in optimizers:
        optimizer.step()
    steps = 3 * args.batch_size * getattr(args, "frame_skip", 1)
    optimizers = [optimizer.state_dict() for optimizer in optimizers]
    shared = {"agent": agent.state_dict(), "optimizers": optimizers, "args": vars(args), "global_step": steps}
    return {**state, **own, **shared}


def refuse_all(name, path, state, wanted):
    """Have a script resume the wrong checkpoints that are ``wanted``, and a whole one in the end, in one process."""
    import common.run

    limit = 2**34  # else what is not refused could take the machine's memory
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.argv = [str(ROOT / f"{name}.py"), "--resume", "runs/X"]
    last = state["args"]["num_iterations"] - 1
    whole = {**state, "iteration": last, "global_step": last * state["global_step"] // 3}
    for what, wrong in [*wrong_states(state), ("whole", whole)]:
        if what not in wanted:
            continue
        path.write_bytes(saved(wrong))
        common.run._say_once.cache_clear()
        assert [*path.parent.iterdir()] == [path] and [*path.parent.parent.iterdir()] == [path.parent]
        print(f"-- {what}", flush=True)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            print(f"exit code {stop.code}", flush=True)
    raise SystemExit(0)


@pytest.mark.parametrize("name", slow(SCRIPTS, "ppo_atari", "ppo_atari_2models"))
def test_every_script_refuses_them(name, state, tmp_path):
    """As the only checkpoint of the run that --resume names: files that don't load, and all that do but are wrong."""
    wanted = ["whole"]
    for what, wrong in wrong_states(state):
        (tmp_path / "1.pt").write_bytes(saved(wrong))
        with contextlib.suppress(BadCheckpoint):
            load_checkpoint(tmp_path / "1.pt")
            wanted.append(what)
    if name != "ppo_mujoco":  # reading them is of common/
        wanted = ["whole", "a step that is not the iteration's", "returns of text", "another shape"]
        wanted.append("no moments of a weight")
    state = state_of(name, state)
    content = saved(state)
    folder = tmp_path / "runs" / "X" / "checkpoints"
    folder.mkdir(parents=True)
    wrong = {"is damaged": content[:-100], "asks for posix.system": repacked(content, HOSTILE_PICKLES["code"])}
    for reason, file in wrong.items():
        (folder / "latest.pt").write_bytes(file)
        code, said = run_process(name, tmp_path, ["--resume", "runs/X"])
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and reason in said, said
    torch.save(state, tmp_path / "state")
    code = "import pathlib, torch, test_checkpoint as t; state = torch.load('state', weights_only=True); "
    code += f"t.refuse_all('{name}', pathlib.Path('runs/X/checkpoints/latest.pt'), state, {wanted})"
    exit_code, said = run_process(name, tmp_path, [], code)
    assert exit_code == 0, said
    *refused, whole = said[said.index("-- ") :].split("-- ")[1:]
    assert "resumed from latest.pt" in whole and whole.endswith("exit code 0\n"), whole
    assert len(refused) == len([x for x in wanted[1:] if "mujoco" in name or "normalizer" not in x]), said
    for one in refused:
        what, error, end = one.splitlines()
        assert error.startswith("error: ") and end == "exit code 2", one
    for what, reason in {
        "a step that is not the iteration's": "is not the end of iteration 3",
        "returns of text": "recent_returns are more than numbers",
        "another shape": "is wanted",
        "no moments of a weight": "optimizers are not those of its agent",
        **({"normalizer's networks of 40 GB": "(100000, "} if "mujoco" in name else {}),
    }.items():
        assert all(reason in one for one in refused if one.startswith(f"{what}\n")), said


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    write_file(path, b"old")
    with pytest.raises(TypeError):
        write_file(path, "text where bytes are due")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]
