"""Grids of real, tiny runs on real Ray: what would run, what is done again, what a lost machine costs."""

import contextlib
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

from benchmark.attempt import State, Unit, lock, next_command, state_of
from benchmark.run import experiment_name, parse_command

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# Iterations of 100 steps, each of them logged and every tenth kept
TINY = ["--num-steps", "50", "--minibatch-size", "50", "--obs-norm-steps", "50", "--diagnostics-interval", "1"]
TINY += ["--update-epochs", "1", "--hidden-sizes", "8", "8"]


def command_line(folder, *options, flags=(), total=300):
    return [sys.executable, "-m", "benchmark.run", "--folder", str(folder), "--env-ids", "Hopper-v4",
            *options, "--", *TINY, "--total-timesteps", str(total), *flags]  # fmt: skip


def benchmark(folder, *options, code=0, **more):
    done = subprocess.run(
        command_line(folder, *options, **more), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def files_of(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("runs/**/*") if path.is_file()}


def attempts(log):
    """The commands in a log file, without what is the same in all of them."""
    return [line for line in log.read_text().splitlines() if re.match(r"=== \d", line)]


def wait_for(condition, seconds=120):
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


@pytest.mark.parametrize(
    "study, runs, processes",
    [
        ("atari_baselines", 6 * 3 * 2 * 5, 0),
        ("atari_interventions", 5 * 3 * 3 * 5, 0),
        ("mujoco_baselines", 4 * 3 * 2 * 2 * 5, 4 * 3 * 2 * 2),
        ("mujoco_interventions", 5 * 2 * 3 * 2 * 5, 5 * 2 * 3 * 2),
    ],
)
def test_the_studies_are_the_papers_grids(study, runs, processes, tmp_path):
    assert runs == {"atari_baselines": 180, "atari_interventions": 225,
                    "mujoco_baselines": 240, "mujoco_interventions": 300}[study]  # fmt: skip
    for batched in (False, True)[: 1 + bool(processes)]:
        options = ["--dry-run", "--folder", str(tmp_path / "none"), *(["--batch-seeds"] if batched else [])]
        command = ["bash", str(ROOT / "benchmark" / f"{study}.sh"), *options]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=True)
        *commands, last = done.stdout.splitlines()
        assert last.startswith(f"# {runs} runs: 0 finished, {runs} to run")
        assert len(commands) == len(set(commands)) == (processes if batched else runs)
        assert all(command.startswith("python ppo_") for command in commands)
        names = [re.search(r"--exp-name \S+", command)[0] for command in commands]
        assert len(set(zip(names, [re.search(r"--env-id \S+", x)[0] for x in commands], strict=True))) * 5 == runs
        if batched:
            assert all("ppo_mujoco_multiseed.py" in x and x.endswith("--seeds 25 7 64 27 4") for x in commands)
    assert not (tmp_path / "none").exists()


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
        (["--commands", "python ppo_mujoco.py --seed 1"], "--seed is set for each run here"),
        (["--commands", "python ppo_mujoco.py --resume auto"], "--resume is set for each run here"),
        (["--commands", "python ppo_mujoco.py", "python ppo_mujoco.py --track"], "makes the same runs"),
        (["--commands", "python ppo_mujoco_multiseed.py"], "give --batch-seeds"),
        (["--commands", "python ppo_atari.py", "--batch-seeds"], "can't train several seeds"),
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


# Real runs


def test_a_failing_run_stops_no_other_and_finished_ones_are_not_repeated(tmp_path):
    """On this machine: two runs finish, two are refused; given again, nothing is touched; what is missing is done."""
    folder = tmp_path / "study"
    good, bad = "python ppo_mujoco.py", "python ppo_mujoco.py --gamma 3"
    done = benchmark(folder, "--commands", bad, good, "--seeds", "1", "2", "--num-cpus", "2", code=1)
    runs = sorted((folder / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        check_whole(run, 300)
    table = done.stdout[done.stdout.index("run  ") :].splitlines()
    assert sum(" finished " in line for line in table) == sum(" failed " in line for line in table) == 2
    for line in table[1:5]:
        assert re.search(r"  (finished +300 +\S+|failed +– +–)  logs/\S+\.log$", line)
        assert (folder / line.split()[-1]).is_file()
    assert sum("error: --gamma 3.0: must be at least 0 and at most 1" in line for line in table) == 2

    before = files_of(folder)
    done = benchmark(folder, "--commands", good, "--seeds", "1", "2")
    assert done.stdout.startswith("2 runs: 2 finished, 0 to run\n") and files_of(folder) == before
    # A third seed, in a batch of which two are there
    done = benchmark(folder, "--commands", good, "--seeds", "1", "2", "3", "--batch-seeds", "--num-cpus", "1")
    assert done.stdout.startswith("3 runs: 2 finished, 1 to run in 1 processes\n")
    assert {path: x for path, x in files_of(folder).items() if path in before} == before
    (new,) = set((folder / "runs").iterdir()) - set(runs)
    check_whole(new, 300)

    # Plasticity of each run, once
    probe = ["--commands", "python plasticity_probe.py", "--runs", *map(str, runs), "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmark.run", *probe, "--num-cpus", "1", "--", "--max-samples", "64"]
    for to_run in (2, 0):
        more = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run([*command, "--checkpoints", "last"], **more)
        assert done.returncode == 0 and f"{to_run} to run" in done.stdout, done.stdout + done.stderr
        assert all((run / "plasticity" / "plasticity.csv").is_file() for run in runs)


@pytest.mark.skipif(sys.platform != "linux", reason="a killed scheduler takes its runs along on Linux alone")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_study_goes_on(number, code, tmp_path):
    """Ctrl-C: the runs save and end. Kill: they end at once. Either way the same command completes them."""
    folder, total = tmp_path / "study", 12_000
    options = ["--commands", "python ppo_mujoco.py", "--seeds", "1", "2", "--batch-seeds", "--num-cpus", "1"]
    if number == signal.SIGINT:
        options.remove("--batch-seeds")
    driver = subprocess.Popen(command_line(folder, *options, total=total), cwd=ROOT, env=ENVIRONMENT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
    wait_for(lambda: list(folder.glob("runs/*/checkpoints/previous.pt")))
    assert alive(folder)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == code, said
    wait_for(lambda: not alive(folder), 30)
    if number == signal.SIGINT:
        assert "the same command goes on with what is missing" in said and re.search(r"  interrupted +\d", said)
        assert "  not begun " in said
        (log,) = folder.glob("logs/*.log")
        assert "SIGTERM: finishing this iteration" in log.read_text()
    begun = {path: load(path / "checkpoints" / "latest.pt")["global_step"] for path in folder.glob("runs/*")}
    assert all(0 < step < total for step in begun.values())
    benchmark(folder, *options, total=total)
    assert len(list(folder.glob("runs/*"))) == 2 and begun.keys() <= set(folder.glob("runs/*"))
    for run in folder.glob("runs/*"):
        check_whole(run, total)


def test_a_failed_run_goes_on_from_its_checkpoint(tmp_path):
    """A script that dies once at its second checkpoint is taken up there; one that always dies is given up."""
    root = tmp_path / "root"
    for name in ("benchmark", "common"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    source = (ROOT / "ppo_mujoco.py").read_text()
    line = "        # Rollout\n"
    assert source.count(line) == 1
    for name, condition in (("once", "not checkpoint and iteration == 3"), ("always", "iteration == 3")):
        broken = source.replace(line, f"        if {condition}:\n            os.kill(os.getpid(), 9)\n{line}")
        (root / f"{name}.py").write_text(broken)
    options = ["--commands", "python once.py", "python always.py", "--seeds", "1", "--retries", "1", "--num-cpus", "2"]
    folder = tmp_path / "study"
    done = subprocess.run(command_line(folder, *options, total=500, flags=["--checkpoint-interval", "0.2"]), cwd=root,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (once,), (always,) = (list(folder.glob(f"runs/*__{name}+*")) for name in ("once", "always"))
    check_whole(once, 500)
    assert load(always / "checkpoints" / "latest.pt")["global_step"] == 200
    for name in ("once", "always"):
        (log,) = folder.glob(f"logs/*__{name}+*")
        first, second = attempts(log)
        assert "--resume" not in first and f"--resume runs/{once.name if name == 'once' else always.name}" in second
    assert "failed: " in done.stdout and "exit code 137" in done.stdout


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
            return state_of(run.name.rpartition("__")[0], folder).finished

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
