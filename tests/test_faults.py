"""Full disks, folders that can't be written or are gone, a failing W&B: a line, and the run goes on."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys

import forked
import pytest
from forked import KINDS, MANY_SEEDS, ROOT, STEPS, run, script_of, send, started, wait_for
from test_resume import MANY, check_logs, latest, resume, runs_in
from test_scripts import scalars_of

from common.arguments import end_without_a_traceback_where_nobody_reads

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
EACH = ["--checkpoint-interval", "1e-5"]
# Root may write anywhere; without its capabilities it is a user who owns its files and can still read the scripts.
NOBODY = """
import ctypes, os
if os.geteuid() == 0:
    nothing = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), nothing) == 0
"""


def small(name, iterations):
    """The flags of a small run, of plain code: recording takes half of the time of so short a run."""
    return forked.small(name, iterations) + (["--no-record"] if "mujoco" in name else [])


@pytest.mark.parametrize("name", KINDS)
def test_ctrl_c_before_training_costs_a_line(name, tmp_path):
    interrupt = "import envpool, signal; envpool.make = lambda *args, **kwargs: signal.raise_signal(signal.SIGINT)"
    assert run(name, tmp_path, small(name, 1), interrupt) == (130, "error: interrupted before training began\n")
    assert not (tmp_path / "runs").exists()


def goes_on(name, folder, break_it, mend_it, lines, code=""):
    """Break something in a run's middle: it says so, goes on, and once mended has lost nothing."""

    def printed():
        return (folder / "log").read_text()

    with started(name, folder, [*small(name, MANY), *EACH], code) as process:
        wait_for(lambda: latest(folder) >= 2, process)
        break_it(process)
        wait_for(lambda: all(line in printed() for line in lines), process)
        said, count = printed(), printed().count("a second,")
        wait_for(lambda: printed().count("a second,") > count + 3, process)  # it trains
        mend_it(process)
        reached = latest(folder)
        wait_for(lambda: latest(folder) > reached + 3, process)
        assert send(process, signal.SIGTERM) == 143
    assert "Traceback" not in printed()
    check_logs(name, folder, latest(folder))
    return said


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of ``size`` at ``folder``, where this process may mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here; the tests with a file size limit stand in for it")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
@pytest.mark.parametrize("name", ["ppo_mujoco", MANY_SEEDS])
def test_a_full_disk(name, tmp_path):
    with small_disk(tmp_path / "runs", "100m"):
        filler = tmp_path / "runs" / "Filler__x__0__0"

        def fill(process):
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        lines = ["checkpoints: can't be written to (No space left on device)", "logs wait until it can"]
        goes_on(name, tmp_path, fill, lambda process: filler.unlink(), lines)


@POSIX
@pytest.mark.parametrize("name", forked.slow(["ppo_mujoco", MANY_SEEDS, "ppo_pfo_atari"], "ppo_pfo_atari"))
def test_a_file_size_limit(name, tmp_path):
    unlimited = resource.RLIM_INFINITY

    def limit(process):
        sizes = [path.stat().st_size for path in tmp_path.glob("runs/*/events*")]
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max(sizes) + 100, unlimited))

    def lift(process):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))

    goes_on(
        name, tmp_path, limit, lift, ["checkpoints: can't be written to (File too large)", "logs wait until it can"]
    )


@POSIX
def test_a_folder_that_turns_read_only(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o777)

    def chmod(mode):
        return lambda process: [path.chmod(mode) for path in (*runs_in(tmp_path), *tmp_path.glob("runs/*/checkpoints"))]

    lines = ["checkpoints: can't be written to (Permission denied)"]
    goes_on("ppo_mujoco", tmp_path, chmod(0o555), chmod(0o755), lines, NOBODY)


@POSIX
def test_a_read_only_run_is_not_resumed(tmp_path):
    tmp_path.chmod(0o755)
    assert run("ppo_mujoco", tmp_path, small("ppo_mujoco", 2))[0] == 0  # as root where this is root
    (folder,) = runs_in(tmp_path)
    for path in (folder, folder / "checkpoints"):
        path.chmod(0o555)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    total = ["--total-timesteps", str(4 * STEPS["ppo_mujoco"])]
    code, said = run("ppo_mujoco", tmp_path, [*resume(tmp_path), *total], NOBODY)
    assert code == 2 and "can't be written to" in said and said.count("\n") == 1, said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@POSIX
def test_a_run_without_access_is_passed_over_or_refused(tmp_path):
    tmp_path.chmod(0o755)
    assert run("ppo_mujoco", tmp_path, small("ppo_mujoco", 2))[0] == 0
    (tmp_path / "runs").chmod(0o777)
    (folder,) = runs_in(tmp_path)
    flags, line = resume(tmp_path), f"{folder.relative_to(tmp_path)}: none of its 2 checkpoints can be read; latest.pt"
    folder.chmod(0)
    try:
        code, said = run("ppo_mujoco", tmp_path, flags, NOBODY)
        assert code == 2 and said == f"error: --resume {line} can't be read, Permission denied\n"
        code, said = run("ppo_mujoco", tmp_path, [*small("ppo_mujoco", 2), "--resume", "auto"], NOBODY)
        assert code == 0 and f"--resume auto passes over {line} can't be read, Permission denied\n" in said
        assert "a new one starts" in said
    finally:
        folder.chmod(0o755)


@POSIX
@pytest.mark.parametrize("name", ["ppo_mujoco", MANY_SEEDS, "ppo_atari"])
def test_a_run_that_stops_without_a_checkpoint_says_so(name, tmp_path):
    with started(name, tmp_path, small(name, MANY)) as process:  # which has only the first
        wait_for(lambda: latest(tmp_path) == 0 and (tmp_path / "log").read_text().count("a second,") > 2, process)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        assert send(process, signal.SIGTERM) == 1
    said = (tmp_path / "log").read_text()
    assert said.count("the last checkpoint could not be written") == len(runs_in(tmp_path)), said
    assert latest(tmp_path) == 0 and "Traceback" not in said


LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))\n"


@POSIX
@pytest.mark.parametrize("name", ["ppo_mujoco", MANY_SEEDS])
def test_a_state_that_is_not_saved_is_not_claimed(name, tmp_path):
    flags = ["--learning-rate", "1e6", "--hidden-sizes", *["64"] * 8, "--activation", "ReLU"]
    code, said = run(name, tmp_path, [*small(name, 20), *flags], LIMITED)
    assert code == 1 and "Traceback" not in said
    assert said.count("lacks the state before it") == len(runs_in(tmp_path)) and "holds" not in said, said


@POSIX
@pytest.mark.parametrize("name", ["ppo_mujoco", "ppo_pfo_atari"])
def test_a_deleted_folder(name, tmp_path):
    def delete(process):
        shutil.rmtree(runs_in(tmp_path)[0], ignore_errors=True)  # a file may come while this goes on

    goes_on(name, tmp_path, delete, lambda process: None, ["was deleted; it is made anew"])


FAILING = """
import wandb
log, calls = wandb.Run.log, [0]
def failing(self, *args, **kwargs):
    calls[0] += 1
    if calls[0] > 3:
        raise wandb.errors.CommError("the server is on fire\\nand more")
    return log(self, *args, **kwargs)
wandb.Run.log = failing
"""


def test_a_failing_wandb_costs_a_line(tmp_path):
    flags = [*small("ppo_mujoco", 5), "--track", "--wandb-mode", "offline"]
    code, said = run("ppo_mujoco", tmp_path, flags, FAILING, WANDB_SILENT="true")
    assert code == 0 and said.count("W&B failed and tracks this run no further (the server is on fire)") == 1, said
    check_logs("ppo_mujoco", tmp_path, 5)


def test_wandb_goes_on_with_the_same_run(tmp_path):
    flags = ["--track", "--wandb-mode", "offline"]
    assert run("ppo_mujoco", tmp_path, [*small("ppo_mujoco", 3), *flags], WANDB_SILENT="true")[0] == 0
    total = ["--total-timesteps", str(5 * STEPS["ppo_mujoco"])]
    code, said = run("ppo_mujoco", tmp_path, [*resume(tmp_path), *total], WANDB_SILENT="true")
    assert code == 0, said
    names = [path.name for path in runs_in(tmp_path)[0].glob("wandb/offline-run-*/run-*.wandb")]
    assert len(names) == 2 and len(set(names)) == 1  # one run's id


SERVER = """
import wandb
init = wandb.init
class Resumed:
    resumed, summary, logged = True, {"global_step": STEP}, []
    config = type("", (), {"update": lambda self, *args, **kwargs: None})()
    def define_metric(self, *args, **kwargs): pass
    def log(self, scalars): print("logged at", scalars["global_step"], flush=True)
    def finish(self, exit_code): print("finished with", exit_code, flush=True)
def connect(**options):
    print("id", options["id"], options["resume"], flush=True)
    return Resumed()
wandb.init = connect
"""


def test_wandb_logs_no_step_twice(tmp_path):
    """A stand-in for the server, which has seen steps beyond the checkpoint."""
    step = STEPS["ppo_mujoco"]
    assert run("ppo_mujoco", tmp_path, small("ppo_mujoco", 3))[0] == 0
    total = ["--total-timesteps", str(6 * step), "--track"]
    code, said = run("ppo_mujoco", tmp_path, [*resume(tmp_path), *total], SERVER.replace("STEP", str(4 * step)))
    assert code == 0 and " allow" in said and "finished with 0" in said, said
    logged = [int(line.split()[-1]) for line in said.splitlines() if line.startswith("logged at")]
    assert min(logged) > 4 * step and {5 * step, 6 * step} <= set(logged)


INIT = """
import wandb
init = wandb.init
def connect(**options):
    settings = wandb.setup().settings
    for name, variable in (("project", "project"), ("entity", "entity"), ("name", "run_name"), ("mode", "mode")):
        print(name, options[name] or getattr(settings, variable), flush=True)
    return init(**{**options, "mode": "disabled"})
wandb.init = connect
"""


def test_the_variables_of_wandb_count_where_the_flags_are_not_given(tmp_path):
    variables = {"WANDB_PROJECT": "theirs", "WANDB_ENTITY": "team", "WANDB_NAME": "my run", "WANDB_MODE": "offline"}
    flags = [*small("ppo_mujoco", 1), "--track"]
    code, said = run("ppo_mujoco", tmp_path, flags, INIT, **variables)
    assert code == 0 and "project theirs\nentity team\nname my run\nmode offline\n" in said, said
    given = ["--wandb-project-name", "ours", "--wandb-entity", "us", "--wandb-mode", "online"]
    code, said = run("ppo_mujoco", tmp_path, [*flags, *given], INIT, **variables)
    assert code == 0 and "project ours\nentity us\nname my run\nmode online\n" in said, said
    code, said = run("ppo_mujoco", tmp_path, flags, INIT, WANDB_PROJECT="", WANDB_MODE="")
    assert code == 0 and "project no-representation-no-trust\n" in said and "mode online\n" in said, said
    assert "name Hopper-v4__ppo_mujoco__7__" in said, said


@pytest.mark.parametrize("mode, files", [("offline", 1), ("disabled", 0)])
def test_the_mode_of_the_environment(tmp_path, mode, files):
    code, said = run("ppo_mujoco", tmp_path, [*small("ppo_mujoco", 3), "--track"], WANDB_MODE=mode)
    (folder,) = runs_in(tmp_path)
    assert code == 0 and "can't be reached" not in said and "W&B failed" not in said, said
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == files
    check_logs("ppo_mujoco", tmp_path, 3)


@pytest.mark.parametrize("variable, value", [("MODE", "off"), ("PROJECT", "a/b"), ("ENTITY", "two words")])
def test_wrong_variables_of_wandb_cost_a_line(tmp_path, variable, value):
    flags, variables = small("ppo_mujoco", 1), {f"WANDB_{variable}": value}
    code, said = run("ppo_mujoco", tmp_path, [*flags, "--track"], **variables)
    assert code == 2 and said.startswith(f"error: WANDB_{variable} '{value}': must be ") and said.count("\n") == 1
    assert run("ppo_mujoco", tmp_path, flags, **variables)[0] == 0  # which doesn't ask for W&B


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_wandb_without_a_home_keeps_to_its_files(tmp_path, home):
    code = "import os\nfor name in ('HOME', 'XDG_CACHE_HOME', 'WANDB_CACHE_DIR'):\n    os.environ.pop(name, None)\n"
    code += f"os.environ['HOME'] = {home!r}\n" if home else ""
    flags = [*small("ppo_mujoco", 1), "--track", "--wandb-mode", "offline"]
    code, said = run("ppo_mujoco", tmp_path, flags, code, WANDB_SILENT="true")
    assert code == 0 and " INFO " not in said and " ERROR " not in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "runs"]


@POSIX
def test_a_console_that_is_gone_does_not_matter(tmp_path):
    """Output to a pipe that nobody reads any more, as with ``| head``."""
    flags = small("ppo_mujoco", 5)
    code = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\nos.dup2(write, 2)\n"
    assert run("ppo_mujoco", tmp_path, flags, code)[0] == 0
    check_logs("ppo_mujoco", tmp_path, 5)


@POSIX
@pytest.mark.parametrize("console", ["gone", "full"])
def test_the_exit_code_is_the_runs_whatever_becomes_of_the_console(tmp_path, console):
    """Of a process of its own, whose streams Python flushes last: it would make 120 of a flush that fails."""
    if console == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    read, write = os.pipe() if console == "gone" else (None, os.open("/dev/full", os.O_WRONLY))
    if read is not None:
        os.close(read)
    first = small("ppo_mujoco", 1)
    for flags, code in ((first, 0), (["--resume", "auto", *first], 0), (["--gamma", "2"], 2)):
        command = [sys.executable, str(ROOT / "ppo_mujoco.py"), *flags]
        assert subprocess.run(command, cwd=tmp_path, stdout=write, stderr=write, timeout=300).returncode == code
    os.close(write)
    assert latest(tmp_path) == 1 and len(runs_in(tmp_path)) == 2


@POSIX
def test_a_table_that_nobody_reads_to_its_end_is_no_error(monkeypatch):
    """As with ``| head``, of a process of its own; an error of another pipe than the console is one."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "benchmark.recipe", "--list"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")

    found = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: found.append(error))
    end_without_a_traceback_where_nobody_reads()
    error = BrokenPipeError(32, "Broken pipe")
    sys.excepthook(BrokenPipeError, error, None)
    assert found == [(BrokenPipeError, error, None)]


def test_a_console_with_few_characters_does_not_matter(tmp_path):
    flags = [*small("ppo_mujoco", 3), "--exp-name", "café"]
    code, said = run("ppo_mujoco", tmp_path, flags, "import sys\nsys.stdout.reconfigure(encoding='ascii')")
    assert code == 0 and "__caf\\xe9__7__" in said, said
    check_logs("ppo_mujoco", tmp_path, 3)


BROKEN_FILM = """
import imageio.v2 as imageio
class Film:
    def __enter__(self): return self
    def __exit__(self, *error): pass
    def append_data(self, image): raise OSError(28, "No space left on device")
imageio.get_writer = lambda *args, **kwargs: Film()
"""


@pytest.mark.parametrize("name", forked.slow(KINDS, "ppo_atari_2models", "ppo_pfo_atari", MANY_SEEDS))
def test_a_video_that_cant_be_written_costs_a_line(name, tmp_path):
    if "mujoco" in name and not __import__(script_of(name)).can_render("Hopper-v4"):
        pytest.skip("no EGL here")
    flags = [*small(name, 2), "--eval-episodes", "1", "--capture-video"]
    code, said = run(name, tmp_path, flags, BROKEN_FILM)
    runs = runs_in(tmp_path)
    assert code == 0 and said.count("it is left out") == 2 * len(runs), said
    for path in runs:
        assert {"eval/greedy/episodic_return", "eval/sampled/episodic_return"} <= scalars_of(path).keys()
    assert os.path.exists(runs[0] / "checkpoints" / "latest.pt")
