"""The shell scripts: they parse, run from any folder, and pass the user's options last."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, sample_options, vae_options
from PIL import Image

LAUNCHERS = ["train_vae", "encode_dataset", "train_ldm_unet", "train_controlnet", "sample"]


def with_torchrun() -> dict[str, str]:
    """The environment with this interpreter's scripts first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_what_users_edit(name):
    path = ROOT / "scripts" / f"{name}.sh"
    text = path.read_text()
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in text and text.rstrip().endswith('"$@"')
    variables = [line for line in text.splitlines() if line[:1].isupper() and "=" in line]
    assert variables and all("#" in line for line in variables)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_reach_their_script_from_any_folder(name, tmp_path):
    """Options given on the command line come last, so --help wins over all others."""
    launcher = str(ROOT / "scripts" / f"{name}.sh")
    done = subprocess.run(
        ["bash", launcher, "--help"],
        cwd=tmp_path,
        env=with_torchrun(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: {name}.py" in done.stdout
    assert "(default: " in done.stdout
    assert f"python {name}.py" in done.stdout.split("example:")[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_trains_on_two_processes(phantoms, tmp_path, without_weights):
    launcher = str(ROOT / "scripts" / "train_vae.sh")
    options = vae_options(phantoms, tmp_path / "run", "--steps", "2")
    environment = {**with_torchrun(), "GPUS": "2"}
    done = subprocess.run(
        ["bash", launcher, *options], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and (tmp_path / "run" / "vae_best.pth").is_file()


STAGE = """
import os, signal, sys
sys.path.insert(0, {root!r})
from fibldm.cli import run_script
def main(rank):
    with open("starts", "a") as starts:
        starts.write(f"{{rank}}\\n")
    {body}
run_script(main, lambda: os.environ["RANK"])
"""


@pytest.mark.parametrize(
    ("body", "restarts", "code", "starts"),
    [
        ("raise ValueError('a mistake')", 2, 2, 1),
        ("raise SystemExit(75)", 0, 75, 1),
        ("raise SystemExit(75)", 2, 75, 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, 137, 2),
    ],
)
def test_several_processes_end_with_the_code_of_their_stage(body, restarts, code, starts, tmp_path):
    """And torchrun starts again only what may end otherwise then."""
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(ROOT), body=body))
    command = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--standalone"]
    command += ["--nproc_per_node", "2", "--max-restarts", str(restarts), "stage.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=with_torchrun(), capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    ranks = (tmp_path / "starts").read_text()  # the other may be ended before it gets there
    assert max(ranks.count("0"), ranks.count("1")) == starts
    assert "Traceback" not in done.stderr and "FAILED" not in done.stderr
    assert ("was ended by SIGKILL" in done.stderr) is (code == 137)
    assert ("error: a mistake" in done.stderr) is (code == 2)


def test_a_launcher_shows_one_message_and_code_2(tmp_path):
    launcher = str(ROOT / "scripts" / "train_vae.sh")
    wrong = ["--csv_file", str(tmp_path / "nowhere.csv"), "--save_dir", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", launcher, *wrong, "--device", "cpu"],
        env=with_torchrun(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "nowhere.csv: no such file" in done.stderr


def test_the_sampling_launcher_takes_contours_of_the_users_own(stages, tmp_path):
    """They replace the held-out contours that the launcher asks for by default."""
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 4:14] = mask[8:24, 18:28] = 255
    Image.fromarray(mask).save(tmp_path / "contour.png")
    options = [*sample_options(stages, tmp_path / "out"), "--contours", tmp_path / "contour.png"]
    launcher = str(ROOT / "scripts" / "sample.sh")
    command = ["bash", launcher, *map(str, options), "--num_samples", "1"]
    done = subprocess.run(command, env=with_torchrun(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sample_00000.png").is_file()


def test_the_sampling_launcher_draws_without_contours(stages, tmp_path):
    words = ["--vae_checkpoint", stages / "vae" / "vae_best.pth", "--steps", "2"]
    words += ["--unet_checkpoint", stages / "unet" / "unet_best.pth", "--device", "cpu"]
    words += ["--output_dir", tmp_path / "out", "--unconditional", "--num_samples", "2"]
    command = ["bash", str(ROOT / "scripts" / "sample.sh"), *map(str, words)]
    done = subprocess.run(command, env=with_torchrun(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "sample_00001.png").is_file()


def test_several_nodes_need_an_endpoint():
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "sample.sh")],
        env={**with_torchrun(), "NODES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "RDZV_ENDPOINT" in done.stderr


SBATCH = ROOT / "scripts" / "slurm" / "train.sbatch"

# Stand-ins for Slurm: srun ends with SRUN_CODE, or starts two tasks one after the other.
SLURM = {
    "srun": """
echo "srun $*" >> "$CALLS"
while [ "${1#--}" != "$1" ]; do shift; done
[ -z "${SRUN_CODE:-}" ] || exit "$SRUN_CODE"
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 "$@"; done""",
    "scontrol": """
echo "scontrol $*" >> "$CALLS"
[ "$1" = show ] && printf 'host7\\nhost8\\n' || exit "${REQUEUE_CODE:-0}\"""",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs train.sbatch as Slurm would; returns what came of it and the commands it gave."""
    for name, text in SLURM.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/usr/bin/env bash{text}\n")
        command.chmod(0o755)
    (tmp_path / "spool").mkdir()
    script = shutil.copy(SBATCH, tmp_path / "spool" / "slurm_script")  # Slurm runs a copy
    launcher = tmp_path / "stage.sh"
    ranks = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    launcher.write_text(f'echo "{ranks}:$(printf "<%s>" "$@")"\n')

    def run(*arguments: str, **variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            **{"CALLS": str(calls), "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "host[7-8]"},
            **variables,
        }
        command = ["bash", script, *(arguments or ["stage.sh"])]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done, calls.read_text().splitlines()

    return run


REQUEUE = "scontrol requeue 123"


def test_the_slurm_script_parses_and_asks_for_what_it_relies_on():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    lines = SBATCH.read_text().splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))  # as Slurm reads it
    words = [line.split()[1] for line in head if line.startswith("#SBATCH ")]
    assert len(words) == sum(line.startswith("#SBATCH ") for line in lines)
    options = {name: value for name, _, value in (word.partition("=") for word in words)}
    assert options["--signal"].startswith("USR1@") and options["--open-mode"] == "append"
    assert "--requeue" in options
    assert not any("gpu" in name or "gres" in name for name in options)  # clusters without GPUs


def test_slurm_tasks_are_ranks_of_one_process_group(slurm):
    done, calls = slurm("stage.sh", "--steps", "4 5", "--seed", "1", SLURM_CPUS_PER_TASK="3")
    assert done.returncode == 0, done.stderr
    ranks = [line for line in done.stdout.splitlines() if "host7 " in line]
    assert ranks == [f"{rank} 0 2 host7 10123:<--steps><4 5><--seed><1>" for rank in (0, 1)]
    start = next(call for call in calls if call.startswith("srun"))
    # A rank that leaves first must not end the others; srun does not inherit the cores of a task.
    assert "--kill-on-bad-exit=0 --wait=" in start and "--cpus-per-task=3 " in start
    assert REQUEUE not in calls


@pytest.mark.parametrize("code", [75, 138, 143])
def test_slurm_queues_a_stopped_training_again(slurm, code):
    done, calls = slurm(SRUN_CODE=str(code), SLURM_RESTART_COUNT="99")
    assert done.returncode == 0 and calls.count(REQUEUE) == 1, done.stderr
    assert f"code {code}" in done.stdout


@pytest.mark.parametrize("code", [0, 1, 2, 134, 137])
def test_slurm_does_not_queue_again_what_has_ended(slurm, code):
    done, calls = slurm(SRUN_CODE=str(code))
    assert done.returncode == code and REQUEUE not in calls
    assert f"ended with code {code}" in done.stdout


def test_slurm_queues_again_only_so_often(slurm):
    done, calls = slurm(SRUN_CODE="75", SLURM_RESTART_COUNT="100")
    assert done.returncode == 75 and REQUEUE not in calls
    assert "MAX_RESTARTS" in done.stderr and "goes on from the last checkpoint" in done.stderr


def test_slurm_that_refuses_to_queue_again_is_an_error(slurm):
    done, calls = slurm(SRUN_CODE="75", REQUEUE_CODE="1")
    assert done.returncode == 75 and REQUEUE in calls
    assert "cannot queue again" in done.stderr


def test_the_slurm_script_needs_a_launcher_and_a_job(slurm):
    for arguments, variables, message in (
        (["nowhere.sh"], {}, "nowhere.sh: expected one"),
        (["stage.sh"], {"SLURM_JOB_ID": ""}, "not a Slurm job"),
    ):
        done, calls = slurm(*arguments, **variables)
        assert done.returncode == 2 and message in done.stderr and not calls


def test_gpus_without_a_process_are_said(slurm):
    for processes, warned in (("1", True), ("4", False)):
        done, _ = slurm(SLURM_GPUS_ON_NODE="4", SLURM_NTASKS_PER_NODE=processes, SRUN_CODE="0")
        assert ("--ntasks-per-node 4" in done.stdout) is warned


@pytest.fixture
def toolbox(tmp_path):
    """The environment of a launcher that finds a stand-in for python beside torchrun.

    The python leaves its process id in `started`; at SIGUSR1 it ends with code 75.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text("#!/bin/sh\nexit 9\n")
    body = "import os, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))"
    body += f"; open({str(tmp_path / 'started.tmp')!r}, 'w').write(str(os.getpid()))"
    body += f"; os.rename({str(tmp_path / 'started.tmp')!r}, {str(tmp_path / 'started')!r})"
    body += "; time.sleep(60 * ('--stay' in sys.argv)); print('python', *sys.argv[1:3])"
    (folder / "python").write_text(f"#!{sys.executable}\n{body}\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "GPUS", "NODES")}
    return {**environment, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def test_a_rank_of_a_scheduler_starts_without_torchrun(toolbox):
    command = ["bash", str(ROOT / "scripts" / "train_vae.sh")]
    for variables, found in (
        ({"GPUS": "4"}, ("python scripts/launch.py --standalone", 0)),
        ({"GPUS": "4", "RANK": "0"}, ("python train_vae.py --csv_file", 0)),
        ({"NODES": "2", "RANK": "1"}, ("python train_vae.py --csv_file", 0)),
    ):
        done = subprocess.run(command, env=toolbox | variables, capture_output=True, text=True)
        assert (done.stdout.strip(), done.returncode) == found, done.stderr


@pytest.mark.parametrize("rank", ["", "0"])
def test_a_signal_to_the_launcher_reaches_python(toolbox, tmp_path, rank):
    launcher = str(ROOT / "scripts" / "train_vae.sh")
    started = tmp_path / "started"
    with subprocess.Popen(["bash", launcher, "--stay"], env=toolbox | {"RANK": rank}) as process:
        until = time.monotonic() + 30
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.02)
        python = int(started.read_text())
        process.send_signal(signal.SIGUSR1)
        code = process.wait(30)
        if python != process.pid:
            os.kill(python, signal.SIGKILL)
    assert code == 75 and python == process.pid
