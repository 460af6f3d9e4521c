"""Grids of real, tiny runs on real Ray: what would run, what is done again, what a lost machine costs."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_scripts import load, scalars_of

from benchmark.attempt import State, Unit, defaults_of, flags_of, lock, newest_checkpoints, next_command, states_of
from benchmark.logs import intervention_of
from benchmark.run import Args, about_runs, experiment_name, grid, parse_command

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# Iterations of 100 steps, each of them logged and every tenth kept
TINY = ["--num-steps", "50", "--minibatch-size", "50", "--obs-norm-steps", "50", "--diagnostics-interval", "1"]
TINY += ["--update-epochs", "1", "--hidden-sizes", "8", "8"]


def command_line(folder, *options, flags=(), total=300):
    return [sys.executable, "-m", "benchmark.run", "--folder", str(folder), "--env-ids", "Hopper-v4",
            *options, "--", *TINY, "--total-timesteps", str(total), *flags]  # fmt: skip


def benchmark(folder, *options, code=0, root=ROOT, **more):
    done = subprocess.run(
        command_line(folder, *options, **more), cwd=root, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("runs/**/*") if path.is_file()}


def attempts(log):
    """The commands in a log file, without what is the same in all of them."""
    return [line for line in log.read_text().splitlines() if re.match(r"=== \d", line)]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def alive(folder):
    """The processes whose working directory is ``folder``: the training scripts of its runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == str(folder.resolve()):
                found.append(int(path.name))
        except OSError:  # it has ended, or is not ours
            continue
    return found


def parent(process):
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def check_whole(run, total, step=100):
    """A finished run has every iteration once, in order, and says so in its last checkpoint."""
    for tag in ("losses/policy_loss", "representation/after/actor/pca_rank"):
        assert [x for x, _ in scalars_of(run)[tag]] == list(range(step, total + 1, step))
    state = load(run / "checkpoints" / "latest.pt")
    assert state["global_step"] == total and state["iteration"] == state["args"]["num_iterations"]
    assert len(scalars_of(run).get("charts/episodic_return", [])) == state["episodes"]


# What would run


SEEDS = (25, 7, 64, 27, 4)
# The paper's: environments, epochs, (activation, what is done to PPO, layers and coefficient of PFO)
ATARI = ("Phoenix-v5", "NameThisGame-v5", "DoubleDunk-v5", "Qbert-v5", "BattleZone-v5", "Gravitar-v5")
OTHERS = ("reset Adam", "Adam betas", "shared trunk")
STUDIES = {
    "atari_baselines": (ATARI, (4, 6, 8), [("ReLU", "none", None)], ("constant", "linear"), 180),
    "atari_interventions": (
        ("Phoenix-v5", "NameThisGame-v5", "Gravitar-v5"),
        (4, 6, 8),
        [
            *(("ReLU", "PFO last", ("last", 1)), ("ReLU", "PFO all", ("all", 10))),
            *(("ReLU", name, None) for name in OTHERS),
        ],
        ("constant",),
        225,
    ),
    "mujoco_baselines": (
        ("Ant-v4", "HalfCheetah-v4", "Humanoid-v4", "Hopper-v4"),
        (10, 15, 20),
        [("Tanh", "none", None), ("ReLU", "none", None)],
        ("constant", "linear"),
        240,
    ),
    "mujoco_interventions": (
        ("Humanoid-v4", "Hopper-v4"),
        (10, 15, 20),
        [
            *(("Tanh", "PFO last", ("last", 1)), ("Tanh", "PFO all", ("all", 1))),
            *(("ReLU", "PFO last", ("last", 10)), ("ReLU", "PFO all", ("all", 10))),
            *itertools.product(("Tanh", "ReLU"), OTHERS, [None]),
        ],
        ("constant",),
        300,
    ),
}


def runs_of(command, suite):
    """What a printed command trains, as in STUDIES, for each of its seeds."""
    _, script, *words = command.split()
    flags = flags_of(words)
    seeds = flags.pop("seeds", None) or flags.pop("seed")
    args = dict(defaults_of(script))
    for name, values in flags.items():
        name = name.replace("-", "_")
        args[name] = type(args.get(name, ""))(*values) if values else True
    intervention = intervention_of(args, script.removesuffix(".py"), suite, args["activation"])
    pfo = (args["pfo_layers"], args["pfo_coef"]) if args.get("pfo_coef") else None
    schedule = "linear" if args["anneal_lr"] else "cosine" if args["cosine_lr"] else "constant"
    what = args["activation"], intervention, pfo
    return [(args["env_id"], args["update_epochs"], what, schedule, int(seed)) for seed in seeds]


@pytest.mark.parametrize("study", STUDIES)
def test_the_studies_are_the_papers_grids(study, tmp_path):
    *axes, count = STUDIES[study]
    suite, batching = ("Atari", [False]) if study.startswith("atari") else ("MuJoCo", [False, True])
    for batched in batching:
        options = ["--dry-run", "--folder", str(tmp_path / "none"), *(["--batch-seeds"] if batched else [])]
        command = ["bash", str(ROOT / "benchmark" / f"{study}.sh"), *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)
        *commands, last = done.stdout.splitlines()
        assert last.startswith(f"# {count} runs: 0 finished, {count} to run")
        found = [run for command in commands for run in runs_of(command, suite)]
        assert len(found) == count and set(found) == set(itertools.product(*axes, SEEDS))
        names = {tuple(re.findall(r"--(?:env-id|exp-name) \S+", command)) for command in commands}
        assert len(names) * len(SEEDS) == count  # no two settings share a folder
        if batched:
            assert all("ppo_mujoco.py" in x and x.endswith("--seeds 25 7 64 27 4") for x in commands)
    assert not (tmp_path / "none").exists()


def test_a_dry_run_whose_reader_leaves_ends_quietly(tmp_path):
    command = [sys.executable, "-m", "benchmark.run", "--dry-run", "--folder", str(tmp_path / "none")]
    command += ["--commands", "python ppo_mujoco.py", "--env-ids", "Hopper-v4"]
    command += ["--seeds", *map(str, range(1900))]  # more than a pipe holds
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("python ppo_mujoco.py")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) == 0


def test_a_name_says_what_is_learnt():
    def name(*flags):
        return experiment_name(*parse_command(f"python ppo_mujoco.py {' '.join(flags)}", []))

    assert name() == "ppo_mujoco"
    assert (
        name("--pfo-coef 1", "--anneal-lr") == name("--anneal_lr", "--pfo_coef=1") == "ppo_mujoco+anneal-lr+pfo-coef-1"
    )
    assert name("--track", "--device cpu", "--no-compile", "--eval-episodes 3") == "ppo_mujoco"
    assert name("--anneal-lr", "--no-anneal-lr") == "ppo_mujoco+no-anneal-lr"
    assert name("--exp-name mine", "--seed 3") == "mine+seed-3"
    names = {name("--pfo-coef", "1e-3"), name("--pfo-coef", "1e+3"), name("--a", "b/c"), name("--a", "b:c")}
    assert len(names) == 4 and all(re.fullmatch(r"[\w.+-]+", x) and "__" not in x for x in names)
    assert len(name(*(f"--flag{i} {i}" for i in range(100)))) == 100


def test_a_batch_goes_on_together_where_it_can():
    unit = Unit(("python", "x.py"), "x.log", ("a", "b", "c"), (1, 2, 3), batched=True)
    at = lambda iteration, before=None: State(f"runs/{iteration}", 1, iteration, before)  # noqa: E731
    end = State("runs/end", 9, 9, finished=True)
    new = ["python", "x.py", "--seeds"]
    assert next_command(unit, [State()] * 3) == [*new, "1", "2", "3"]
    assert next_command(unit, [end] * 3) is None
    assert next_command(unit, [at(4), end, at(4)]) == [*new, "1", "3", "--resume", "runs/4", "runs/4"]
    assert next_command(unit, [at(6, 4), at(4, 2), State()]) == [*new, "1", "2", "--resume", "runs/6", "runs/4"]
    assert next_command(unit, [at(8, 6), at(4, 2), end]) == [*new, "2", "--resume", "runs/4"]
    assert next_command(unit, [end, end, State()]) == [*new, "3"]


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "--commands"),
        (["--commands"], "--commands"),
        (["--commands", "ppo_mujoco.py"], "must begin with python"),
        (["--commands", "python no.py"], "there is no no.py"),
        (["--commands", "python ../ppo_mujoco.py"], "there is no ../ppo_mujoco.py"),
        (["--commands", "python ppo_mujoco.py 'x"], "no closing quotation"),
        (["--commands", "python ppo_mujoco.py x"], "'x' belongs to no flag"),
        (["--commands", "python ppo_mujoco.py -- --track"], "'--' belongs to no flag"),
        (["--commands", "python ppo_mujoco.py", "--", "--track", "--", "1"], "'--' belongs to no flag"),
        (["--commands", "python ppo_mujoco.py --exp-name"], "--exp-name must have a value"),
        (["--commands", "python ppo_mujoco.py --seed 1"], "--seed is set for each run here"),
        (["--commands", "python ppo_mujoco.py --resume auto"], "--resume is set for each run here"),
        (["--commands", "python ppo_mujoco.py", "python ppo_mujoco.py --track"], "makes the same runs"),
        (["--commands", "python ppo_mujoco.py --seeds 1 2"], "give --batch-seeds"),
        (["--commands", "python ppo_atari.py", "--batch-seeds"], "ppo_atari.py can't train several seeds"),
        (["--commands", "python ppo_mujoco.py", "--seeds"], "--seeds"),
        (["--commands", "python ppo_mujoco.py", "--seeds", "1", "1"], "--seeds 1 1: must be"),
        (["--commands", "python ppo_mujoco.py", "--seeds", "-1"], "--seeds"),
        (["--commands", "python ppo_mujoco.py", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (["--commands", "python ppo_mujoco.py", "--env-ids", "a/b"], "--env-ids 'a/b': must be"),
        (["--commands", "python ppo_mujoco.py", "--cpus-per-run", "0"], "--cpus-per-run 0: must be at least 1"),
        (["--commands", "python ppo_mujoco.py", "--gpus-per-run", "1.5"], "--gpus-per-run 1.5: must be"),
        (["--commands", "python ppo_mujoco.py", "--retries", "-1"], "--retries -1: must be at least 0"),
        (["--commands", "python ppo_mujoco.py", "--address", "x:1", "--num-cpus", "2"], "--num-cpus 2: must not"),
        (["--commands", "python plasticity_probe.py", "--runs", "tests"], "--runs: must not go with --env-ids"),
        (["--commands", "python ppo_mujoco.py", "--folder", "README.md"], "--folder README.md: is not a folder"),
    ],
)
def test_wrong_arguments_cost_one_line(options, said, monkeypatch, capsys, tmp_path):
    from benchmark.run import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run.py", "--env-ids", "Hopper-v4", *options])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and said in printed.err and printed.err.count("\n") == 1, printed


def test_commands_about_runs_are_told_apart(tmp_path, capsys):
    """By folder and command, not by the folder's name; what is no run is said, what is there twice refused."""
    for name in ("runs/X", "a/X", "b/X"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "empty").mkdir()

    def units(*names, commands=("python plasticity_probe.py",)):
        return about_runs(Args(commands, runs=tuple(tmp_path / name for name in names), folder=tmp_path), [])

    found = units("runs/X", "a/X", "b/X", "a/empty")
    assert [unit.probed for unit in found] == ["runs/X", "a/X", "b/X"] and len({unit.log for unit in found}) == 3
    assert found[0].log == "X__plasticity_probe.log" and units("b/X") == found[2:]
    assert f"left out, no run's folder, for want of checkpoints/: {tmp_path / 'a' / 'empty'}" in capsys.readouterr().err
    assert len(units("a/X", commands=("python plasticity_probe.py", "python plasticity_probe.py --name other"))) == 2
    for names, commands in (
        (["a/X", "a/../a/X"], ["python plasticity_probe.py"]),
        (["a/X"], ["python plasticity_probe.py", "python plasticity_probe.py --device cpu"]),
    ):
        with pytest.raises(SystemExit):
            units(*names, commands=commands)
        assert "does the same on" in capsys.readouterr().err


def test_a_probe_is_done_where_its_table_is(tmp_path):
    run = tmp_path / "runs" / "X"
    (run / "checkpoints").mkdir(parents=True)
    args = Args(("python plasticity_probe.py",), runs=(run,), folder=tmp_path)
    for flags, name in (([], "plasticity"), (["--name", "other"], "other")):
        (unit,) = about_runs(args, flags)
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / unit.log).write_text(f"=== done: {' '.join(unit.command)}\n")
        assert not states_of(unit, tmp_path)[0].finished
        (run / name).mkdir()
        (run / name / "plasticity.csv").touch()
        assert states_of(unit, tmp_path)[0].finished


# Real runs


def copy_repository(root, **scripts):
    """Copy what the scheduler needs, and scripts, {name: what is done at the beginning of each iteration}."""
    for name in ("benchmark", "common"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    for name, inserted in scripts.items():
        source = (ROOT / "ppo_mujoco.py").read_text()
        line = "        # Rollout\n"
        assert source.count(line) == 1
        (root / f"{name}.py").write_text(source.replace(line, f"        {inserted}\n{line}"))
    return root


def check_whose_runs_they_are(folder, runs):
    """A run under the name of another's belongs to a command only if its arguments are those of the command."""
    args = Args(("python ppo_mujoco.py",), ("Hopper-v4",), seeds=(1, 2), folder=folder)
    units = grid(args, [*TINY, "--total-timesteps", "300"])
    changed = dataclasses.replace
    mine = [State(f"runs/{run.name}", 300, 3, None, None, True) for run in runs]

    def states(old="", new="", batched=False):
        command = " ".join(units[0].command)
        assert old in command
        of_both = changed(units[0], names=tuple(unit.names[0] for unit in units), seeds=(1, 2), batched=batched)
        found = states_of(changed(of_both, command=tuple(command.replace(old, new).split())), folder)
        return [changed(state, score=None) for state in found]

    assert states() == states("--minibatch-size 50", "--minibatch-size=50 --device cpu --no-anneal-lr") == mine
    assert states(batched=True) == states("--total-timesteps 300", "--total-timesteps 300 --no-record") == mine
    for old, new in (
        ("--total-timesteps 300", "--total-timesteps 200"),  # it can't be taken back
        ("--total-timesteps 300", ""),  # the script's default
        ("--obs-norm-steps 50", ""),
        ("--num-steps 50", "--num-steps 25"),
        ("--hidden-sizes 8 8", "--hidden-sizes 8"),
        ("--total-timesteps 300", "--total-timesteps 300 --anneal-lr"),
        ("--total-timesteps 300", "--total-timesteps 300 --gamma 0.9"),
        ("--total-timesteps 300", "--total-timesteps 300 --activation ReLU"),
        ("ppo_mujoco.py", "ppo_atari.py"),
    ):
        assert states(old, new) == [State()] * 2, new
    longer = states("--total-timesteps 300", "--total-timesteps 400")
    assert [(x.folder, x.iteration, x.finished) for x in longer] == [(x.folder, 3, False) for x in mine]
    assert all(x.finished for x in states("--total-timesteps 300", "--total-timesteps 399"))  # no whole rollout more


GOOD = "python ppo_mujoco.py"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of two runs, on this machine: its folder, the process, the runs."""
    folder = tmp_path_factory.mktemp("runner") / "study"
    done = benchmark(folder, "--commands", GOOD, "--seeds", "1", "2", "--num-cpus", "2")
    return folder, done, sorted((folder / "runs").iterdir())


def test_a_study_is_done(study):
    folder, done, runs = study
    assert len(runs) == 2
    for run in runs:
        check_whole(run, 300)
    table = done.stdout[done.stdout.index("run  ") :].splitlines()
    assert sum(" finished " in line for line in table) == 2
    for line in table[1:3]:
        assert re.search(r"  finished +300 +\S+  logs/\S+\.log$", line)
        assert (folder / line.split()[-1]).is_file()

    check_whose_runs_they_are(folder, sorted(runs, key=lambda run: run.name.split("__")[2]))


@pytest.mark.slow
def test_finished_runs_are_not_repeated(study):
    """Given again, nothing is touched; of a batch of which two are there, what is missing is done."""
    folder, _, runs = study
    before = files_of(folder)
    done = benchmark(folder, "--commands", GOOD, "--seeds", "1", "2")
    assert done.stdout.startswith("2 runs: 2 finished, 0 to run\n") and files_of(folder) == before
    done = benchmark(folder, "--commands", GOOD, "--seeds", "1", "2", "3", "--batch-seeds", "--num-cpus", "1")
    assert done.stdout.startswith("3 runs: 2 finished, 1 to run in 1 processes\n")
    assert {path: x for path, x in files_of(folder).items() if path in before} == before
    (new,) = set((folder / "runs").iterdir()) - set(runs)
    check_whole(new, 300)


@pytest.mark.slow
def test_the_plasticity_of_each_run_is_probed_once(study):
    folder, _, runs = study
    probe = ["--commands", "python plasticity_probe.py", "--runs", *map(str, runs), "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmark.run", *probe, "--num-cpus", "1", "--", "--max-samples", "64"]
    for to_run in (2, 0):
        more = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run([*command, "--checkpoints", "last"], **more)
        assert done.returncode == 0 and f"{to_run} to run" in done.stdout, done.stdout + done.stderr
        assert all((run / "plasticity" / "plasticity.csv").is_file() for run in runs)


def is_stopped(process):
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def awaits(process, number):
    """Whether a signal waits for a stopped process to go on."""
    pending = re.search(r"ShdPnd:\s+(\w+)", Path(f"/proc/{process}/status").read_text())[1]
    return bool(int(pending, 16) & 1 << (number - 1))


@pytest.mark.skipif(sys.platform != "linux", reason="a killed scheduler takes its runs along on Linux alone")
@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGINT, 130, id="INT", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 130, id="TERM"),
        pytest.param(signal.SIGKILL, -9, id="KILL", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_study_goes_on(number, code, tmp_path):
    """Ctrl-C: the runs save and end. Kill: they end at once. Either way the same command completes them.

    The first script stops in its middle, where the signal meets it. The study that is to get SIGTERM ignores SIGINT, as
    one in the background of a shell script does.
    """
    on_interrupt = signal.SIG_IGN if number == signal.SIGTERM else signal.SIG_DFL
    kill = f"os.kill(os.getpid(), {int(signal.SIGSTOP)})"
    stop = f"if iteration == 5 and not os.path.exists('met'): open('met', 'w').close(), {kill}"
    root = copy_repository(tmp_path / "root", ppo_mujoco=stop)
    folder, total, good, bad = tmp_path / "study", 800, "python ppo_mujoco.py", "python ppo_mujoco.py --gamma 3"
    options = ["--commands", good, "--seeds", "1", "2", "--num-cpus", "1"]
    if number == signal.SIGTERM:
        options = ["--commands", bad, good, f"{good} --gamma 0.9", "--seeds", "1", "--num-cpus", "1"]
    options += ["--batch-seeds"] if number == signal.SIGKILL else []
    driver = subprocess.Popen(command_line(folder, *options, total=total), cwd=root, env=ENVIRONMENT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt))  # fmt: skip
    try:
        wait_for(lambda: any(map(is_stopped, alive(folder))))
        (script,) = alive(folder)
        driver.send_signal(number)
        if number != signal.SIGKILL:
            wait_for(lambda: awaits(script, signal.SIGTERM))
            os.kill(script, signal.SIGCONT)
        said, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == code, said
    wait_for(lambda: not alive(folder), 30)
    begun = {path: load(path / "checkpoints" / "latest.pt")["global_step"] for path in folder.glob("runs/*")}
    assert [*begun.values()] == ([400, 400] if number == signal.SIGKILL else [500])
    if number != signal.SIGKILL:
        assert "the same command goes on with what is missing" in said and re.search(r"  interrupted +500 ", said)
        assert "  not begun " in said
        assert sum("SIGTERM: finishing this iteration" in log.read_text() for log in folder.glob("logs/*.log")) == 1
    if number == signal.SIGTERM:  # the rest is as after Ctrl-C; what had failed before is still told
        assert re.search(r"failed: Hopper\S+: exit code 2, error: --gamma 3.0: must be", said)
        return
    benchmark(folder, *options, total=total, root=root)
    assert len(list(folder.glob("runs/*"))) == 2 and begun.keys() <= set(folder.glob("runs/*"))
    for run in folder.glob("runs/*"):
        check_whole(run, total)


def test_a_failed_run_goes_on_from_its_checkpoint(tmp_path):
    """A script that dies once at its second checkpoint is taken up there; one that always dies stops no other.

    A third one does nothing but tell what it was given.
    """
    kill = "iteration == 3: os.kill(os.getpid(), 9)"
    root = copy_repository(tmp_path / "root", once=f"if runs.first == 1 and {kill}", always=f"if {kill}")
    (root / "told.py").write_text("import json, os; json.dump(dict(os.environ), open('told.json', 'w'))\n")
    commands = ["python once.py", "python always.py", "python told.py"]
    options = ["--commands", *commands, "--seeds", "1", "--retries", "1", "--num-cpus", "2", "--wandb-tags", "a", "b"]
    folder = tmp_path / "study"
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command_line(folder, *options, total=500, flags=["--checkpoint-interval", "0.2"]), cwd=root,
                          env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (once,), (always,) = (list(folder.glob(f"runs/*__{name}+*")) for name in ("once", "always"))
    check_whole(once, 500)
    assert load(always / "checkpoints" / "latest.pt")["global_step"] == 200
    for name in ("once", "always"):
        (log,) = folder.glob(f"logs/*__{name}+*")
        first, second = attempts(log)
        assert "--resume" not in first and f"--resume runs/{once.name if name == 'once' else always.name}" in second
    assert "failed: " in done.stdout and "exit code 137" in done.stdout
    table = done.stdout[done.stdout.index("run  ") :].splitlines()
    (line,) = (line for line in table if " finished " in line)
    assert re.search(r"__once\S+ +finished +500 +\S+  logs/\S+\.log$", line), table
    assert sum(bool(re.search(r"  failed +(200|–) +\S+  logs/\S+\.log$", line)) for line in table) == 2, table

    told = json.loads((folder / "told.json").read_text())
    assert told["OMP_NUM_THREADS"] == "1" and told["CUDA_VISIBLE_DEVICES"] == ""
    assert re.fullmatch(r"Hopper-v4__told\+\S+", told["WANDB_RUN_GROUP"]) and told["WANDB_TAGS"] == "a,b"
    assert "it ended with exit code 0, but without a last checkpoint" in done.stdout


def test_a_lock_outlives_the_attempt(tmp_path):
    """What a script inherits keeps the next attempt out, as long as it lives."""
    path = tmp_path / "x.log"
    with open(path, "ab") as log:
        assert lock(log)
        child = subprocess.Popen(["sleep", "60"], stdout=log)
    try:
        with open(path, "ab") as log:
            import fcntl

            with pytest.raises(BlockingIOError):
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            child.kill()
            child.wait()
            assert lock(log)
    finally:
        child.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="a killed machine takes its runs along on Linux alone")
@pytest.mark.slow
def test_runs_of_a_lost_machine_move_to_another(tmp_path):
    """Two machines, of which one is killed in the middle: nothing is lost, nothing repeated, nothing logged twice."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    folder, total, seeds = tmp_path / "study", 8_000, ["1", "2", "3", "4"]
    node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    found, driver = [], None
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
    try:
        machines = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20) for _ in range(2)]
        cluster.wait_for_nodes()
        options = ["--commands", "python ppo_mujoco.py", "--seeds", *seeds, "--address", cluster.address]
        driver = subprocess.Popen(command_line(folder, *options, total=total), cwd=ROOT, env=ENVIRONMENT, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

        def is_finished(run):
            newest = next(newest_checkpoints(run / "checkpoints"), {"global_step": 0})
            return newest["global_step"] == total

        def middle():
            """A run that is in its middle while another is finished: its script's process and the raylet above it.

            The process is stopped there, since the run could reach its end before its machine is lost.
            """
            assert driver.poll() is None, driver.communicate()[0]
            runs = {run.name.split("__")[2]: run for run in folder.glob("runs/*")}
            ends = [run for run in runs.values() if is_finished(run)]
            for process in alive(folder) if ends else []:
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    seed = re.search(rb"--seed\0(\d+)", Path(f"/proc/{process}/cmdline").read_bytes())
                    run = runs.get(seed and seed[1].decode())
                    if run and run not in ends and (run / "checkpoints" / "previous.pt").is_file():
                        os.kill(process, signal.SIGSTOP)
                        if not is_finished(run):
                            return process, parent(parent(process))
                        os.kill(process, signal.SIGCONT)

        wait_for(lambda: found.append(middle()) or found[-1])
        process, raylet = found[-1]
        finished = [run for run in folder.glob("runs/*") if is_finished(run)]
        before = files_of(folder)
        before = {path: x for path, x in before.items() if set(finished) & set(path.parents)}
        begun = set(folder.glob("runs/*"))
        (doomed,) = (x for x in machines if raylet == x.all_processes["raylet"][0].process.pid)
        cluster.remove_node(doomed, allow_graceful=False)
        wait_for(lambda: process not in alive(folder), 30)
        said, _ = driver.communicate(timeout=240)
        assert driver.returncode == 0, said
    finally:
        if driver:
            driver.kill()
        cluster.shutdown()
    runs = set(folder.glob("runs/*"))
    assert len(runs) == len(seeds) and begun <= runs
    for run in runs:
        check_whole(run, total)
    assert {path: x for path, x in files_of(folder).items() if set(finished) & set(path.parents)} == before
    assert finished and before
    tries = [attempts(log) for log in folder.glob("logs/*.log")]
    assert sorted(map(len, tries)) == [1, 1, 1, 2]
    (moved,) = (x for x in tries if len(x) == 2)
    assert "--resume" not in moved[0] and "--resume runs/" in moved[1]


@pytest.mark.slow
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_path_of_temporary_files(tmp_path, monkeypatch, variable):
    """Beyond what a socket's path may have."""
    long = tmp_path / ("x" * 105)
    long.mkdir()
    monkeypatch.setitem(ENVIRONMENT, variable, str(long))
    options = ["--commands", "python ppo_mujoco.py", "--seeds", "1", "--num-cpus", "1"]
    done = benchmark(tmp_path, *options, total=100)
    (run,) = tmp_path.glob("runs/*")
    check_whole(run, 100)
    assert done.stderr == ""


def test_temporary_files_that_cant_be_written_cost_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "RAY_TMPDIR", "/proc/nowhere")
    said = benchmark(tmp_path, "--commands", "python ppo_mujoco.py", "--seeds", "1", "--num-cpus", "1", code=2).stderr
    assert said.startswith("error: Ray can't start") and "RAY_TMPDIR" in said and said.count("\n") == 1, said
