"""Several processes: killed workers, other numbers of them, two nodes, signals, hangs."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, unet_options, vae_options
from killing import SCRIPTS, contents, differences

from fibldm.tables import Split, read_table

pytestmark = pytest.mark.timeout(600)
STEPS = ["--steps", "30", "--save_interval", "5", "--val_interval", "10", "--log_interval", "1"]


class Launched:
    """A torchrun whose output is read line by line, in a folder of its own."""

    def __init__(
        self, folder: Path, script: str, options: list, *more: str, prefix=(), **environment
    ):
        folder.mkdir(exist_ok=True)
        command = [*prefix, sys.executable, "-m", "torch.distributed.run", *more]
        command += [str(ROOT / f"{script}.py" if script in SCRIPTS else script), *map(str, options)]
        weights = folder.parent / "no_weights"
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(weights), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, text: str) -> None:
        """Read on until a line has this text."""
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"no {text!r} in:\n{self.output()}")

    def worker(self, rank: int) -> int:
        """The process of a rank, whose parent this torchrun is."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                words = (path / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError):
                continue
            if parent == self.process.pid and b"RANK=%d" % rank in words:
                return int(path.name)
        raise AssertionError(f"no process of rank {rank}")

    def end(self) -> int:
        self.lines += self.process.stdout
        return self.process.wait(timeout=300)

    def output(self) -> str:
        return "".join(self.lines)


def standalone(processes: int, restarts: int = 0) -> list[str]:
    return ["--standalone", "--nproc_per_node", str(processes), "--max-restarts", str(restarts)]


def ended_well(launched: Launched) -> None:
    assert launched.end() == 0, launched.output()


@pytest.fixture(scope="module")
def undisturbed(stages, tmp_path_factory) -> dict:
    """What a run on two processes leaves."""
    folder = tmp_path_factory.mktemp("cluster") / "whole"
    ended_well(
        Launched(folder, "train_ldm_unet", unet_options(stages, "run", *STEPS), *standalone(2))
    )
    return contents(folder)


def test_torchrun_restarts_after_a_killed_worker(stages, undisturbed, tmp_path, full, tally):
    """Each of the two, between and at saves; the result is the undisturbed run's."""
    for rank, step in [(1, 7), (0, 12), (1, 20), (0, 3), (1, 16)][: 5 if full else 1]:
        survived = tally("a worker of torchrun --max-restarts is killed")
        folder = tmp_path / f"{rank}_{step}"
        options = unet_options(stages, "run", *STEPS)
        launched = Launched(folder, "train_ldm_unet", options, *standalone(2, 3))
        launched.until(f"step {step}/30  train")
        os.kill(launched.worker(rank), signal.SIGKILL)
        ended_well(launched)
        assert differences(undisturbed, contents(folder)) == []
        survived()


LATE = """
import os, sys, time
sys.path.insert(0, {root!r})
from fibldm import distributed
again = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if again and os.environ["RANK"] == "{late}":
    time.sleep(2.5)
distributed.setup("cpu")
distributed.barrier()
if not again and distributed.rank() == 2:
    os.kill(os.getpid(), 9)
print(f"rank {{distributed.rank()}} has met the others\\n", end="", flush=True)
distributed.leave(0)
"""


@pytest.mark.parametrize("late", [0, 1])
def test_one_restart_is_enough_for_a_rank_that_comes_late(late, tmp_path, tally):
    """torchrun's store still has what the processes of the first start said in it."""
    survived = tally("after a restart a rank comes late")
    script = tmp_path / "late.py"
    script.write_text(LATE.format(root=str(ROOT), late=late))
    launched = Launched(tmp_path / "run", str(script), [], *standalone(3, 1))
    ended_well(launched)
    for rank in range(3):
        assert f"rank {rank} has met the others" in launched.output()
    survived()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_torchrun_saves_at_one_step(number, stages, undisturbed, tmp_path, full, tally):
    if number != "SIGTERM" and not full:
        pytest.skip("with --chaos full")
    survived = tally(f"{number} to torchrun")
    options = unet_options(stages, "run", *STEPS)
    handled = f"--signals_to_handle={number}"
    launched = Launched(tmp_path / "run", "train_ldm_unet", options, *standalone(2), handled)
    launched.until("step 12/30  train")
    launched.process.send_signal(getattr(signal, number))
    assert launched.end() != 0
    said = re.search(r"stopped after step (\d+), all saved", launched.output())
    assert said, launched.output()
    last = torch.load(tmp_path / "run" / "run" / "last.pth", weights_only=True)
    assert last["step"] == int(said[1]) >= 12
    launched = Launched(tmp_path / "run", "train_ldm_unet", options, *standalone(2))
    ended_well(launched)
    assert f"going on after step {said[1]}" in launched.output()
    assert differences(undisturbed, contents(tmp_path / "run")) == []
    survived()


def test_a_run_on_two_processes_goes_on_on_one_and_on_four(stages, tmp_path, tally):
    """With the same data order and noise: else the weights would be far apart."""
    steps = ["--steps", "12", "--save_interval", "5", "--val_interval", "12", "--lr", "1e-3"]
    steps += ["--time_limit", "1-0", "--log_interval", "1"]
    options = unet_options(stages, "run", *steps)
    ended_well(Launched(tmp_path / "one", "train_ldm_unet", options, *standalone(1)))
    launched = Launched(tmp_path / "two", "train_ldm_unet", options, *standalone(2))
    launched.until("step 6/12  train")
    launched.process.send_signal(signal.SIGTERM)
    launched.end()
    assert "all saved" in launched.output()
    expected = torch.load(tmp_path / "one" / "run" / "last.pth", weights_only=True)
    for processes in 1, 4:
        survived = tally("2 processes become 1, become 4")
        folder = tmp_path / f"then_{processes}"
        shutil.copytree(tmp_path / "two", folder)
        ended_well(Launched(folder, "train_ldm_unet", options, *standalone(processes)))
        found = torch.load(folder / "run" / "last.pth", weights_only=True)
        assert found["step"] == 12
        for name, value in expected["states"]["unet"].items():
            torch.testing.assert_close(found["states"]["unet"][name], value, atol=2e-5, rtol=0)
        survived()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def node(number: int, address: str, port: int, local: str) -> list[str]:
    """The first of two nodes, on which they meet, or the second."""
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{address}:{port}"]
    rendezvous += ["--rdzv_conf", f"is_host={int(number == 0)}"]
    rendezvous += ["--rdzv_id", "fibldm", "--local-addr", local]
    return ["--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", *rendezvous]


def rank_of(launched: Launched) -> int:
    """The rank of the only worker that a node has."""
    for rank in 0, 1:
        try:
            launched.worker(rank)
        except AssertionError:
            continue
        return rank
    raise AssertionError("no worker")


def wait_for_worker(launched: Launched) -> int:
    """The rank of a node's worker, once it has started."""
    for _ in range(600):
        try:
            return rank_of(launched)
        except AssertionError:
            time.sleep(0.1)
    raise AssertionError("no worker")


def kill_on_the_second_node(nodes: list[Launched], undisturbed: dict, folder: Path) -> None:
    """Both nodes go on from the last checkpoint, and end as two processes of one node do."""
    ranks = [wait_for_worker(one) for one in nodes]
    assert sorted(ranks) == [0, 1]
    nodes[ranks.index(0)].until("step 12/30  train")
    os.kill(nodes[1].worker(ranks[1]), signal.SIGKILL)
    for one in nodes:
        ended_well(one)
    assert differences(undisturbed, contents(folder)) == []


def test_two_nodes_on_loopback(stages, undisturbed, tmp_path, full, tally):
    if not full:  # they may take minutes to meet again
        pytest.skip("with --chaos full")
    survived = tally("a worker of one of two nodes is killed")
    options, port = unet_options(stages, "run", *STEPS), free_port()
    nodes = [
        Launched(
            tmp_path / "run", "train_ldm_unet", options, *node(i, "127.0.0.1", port, "127.0.0.1")
        )
        for i in range(2)
    ]
    kill_on_the_second_node(nodes, undisturbed, tmp_path / "run")
    survived()


def test_two_nodes_in_network_namespaces(stages, undisturbed, tmp_path, full, tally):
    if not full:
        pytest.skip("with --chaos full")
    names, hosts = ("fibldm_a", "fibldm_b"), ("10.213.7.1", "10.213.7.2")
    setup = [f"ip netns add {name}" for name in names]
    setup += ["ip link add fibldm0 netns fibldm_a type veth peer name fibldm1 netns fibldm_b"]
    for i, (name, host) in enumerate(zip(names, hosts, strict=True)):
        setup += [f"ip -n {name} addr add {host}/24 dev fibldm{i}"]
        setup += [f"ip -n {name} link set {device} up" for device in (f"fibldm{i}", "lo")]
    try:
        for line in setup:
            done = subprocess.run(line.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {line}: {done.stderr}")
        survived = tally("a worker of one of two nodes is killed (network namespaces)")
        options = unet_options(stages, "run", *STEPS)
        nodes = [
            Launched(
                tmp_path / "run",
                "train_ldm_unet",
                options,
                *node(i, hosts[0], 29513, host),
                prefix=("ip", "netns", "exec", name),
                GLOO_SOCKET_IFNAME=f"fibldm{i}",
            )
            for i, (name, host) in enumerate(zip(names, hosts, strict=True))
        ]
        kill_on_the_second_node(nodes, undisturbed, tmp_path / "run")
        survived()
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


MISTAKE = """
import sys
sys.path.insert(0, {root!r})
from fibldm import distributed
from fibldm.cli import run_script
def main(args):
    distributed.setup("cpu")
    if distributed.rank() == {bad}:
        raise ValueError("a mistake on one node")
    distributed.barrier()
run_script(main, lambda: None)
"""


@pytest.mark.parametrize("bad", [0, 1])
def test_a_mistake_on_one_node_ends_both(bad, tmp_path, tally):
    """Under the launchers: without restarts, and without waiting for a node that has gone."""
    survived = tally("a mistake on one of two nodes, under a launcher")
    script, port = tmp_path / "stage.py", free_port()
    script.write_text(MISTAKE.format(root=str(ROOT), bad=bad))
    command = [sys.executable, str(ROOT / "scripts" / "launch.py")]
    nodes = [
        subprocess.Popen(
            [*command, *node(i, "127.0.0.1", port, f"127.0.0.{i + 1}"), str(script)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for i in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=300)[0] for one in nodes]
    assert sorted(one.returncode for one in nodes) == [1, 2], said
    found = [text for text in said if "error (rank" in text and "a mistake on one node" in text]
    assert len(found) == 1 and found[0].count("a mistake on one node") == 1, said
    survived()


TROUBLE = """
import sys
sys.path.insert(0, {root!r})
import torch
import train_vae
from fibldm import distributed
from fibldm.run import Run
from fibldm.cli import run_script
average, note_unreadable = Run.average, Run.note_unreadable
seen = []  # the first is the warm-up's, of a step that is not taken
def average_of_one(self, **values):
    seen.append(values)
    if distributed.rank() == 1 and len(seen) == 4:
        values["loss"] = torch.tensor(float("inf"))  # its gradient is as it should be
    average(self, **values)
def note_of_one(self, rows):
    bad = distributed.rank() == 1 and len(seen) == 5
    note_unreadable(self, torch.tensor([{row}]) if bad else rows)
Run.average, Run.note_unreadable = average_of_one, note_of_one
run_script(train_vae.main, train_vae.parse_args)
"""


def test_what_one_rank_finds_all_act_upon(phantoms, tmp_path, tally):
    """A loss that is not finite on one rank, an image that one cannot read: rank 0 says it too."""
    survived = tally("a loss that is not finite, an unreadable image, on one of two ranks")
    table, _ = read_table(phantoms / "label.csv", phantoms, Split(0, 0.3, 0.1))
    row = next(i for i, of in enumerate(table) if of.split == "train")
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE.format(root=str(ROOT), row=row))
    more = ["--steps", "8", "--save_interval", "2", "--log_interval", "1", "--max_bad_images", "1"]
    launched = Launched(
        tmp_path / "run", str(script), vae_options(phantoms, "run", *more), *standalone(2)
    )
    ended_well(launched)
    assert "step 3: loss not finite; it is skipped" in launched.output()
    assert f"rows [{row}] of the table (from 0) cannot be read" in launched.output()
    last = torch.load(tmp_path / "run" / "run" / "last.pth", weights_only=True)
    assert last["skipped"] == 1 and last["states"]["ema"]["updates"] == 7
    assert last["bad_images"] == [row]
    survived()


def test_a_rank_that_is_stopped_is_named(stages, tmp_path, tally):
    survived = tally("a rank is stopped (SIGSTOP)")
    options = unet_options(stages, "run", *STEPS, "--timeout", "0.2")
    launched = Launched(tmp_path / "run", "train_ldm_unet", options, *standalone(2))
    launched.until("step 7/30  train")
    os.kill(launched.worker(1), signal.SIGSTOP)
    assert launched.end() != 0
    assert "(--timeout): rank 1 does not answer (last seen at" in launched.output()
    last = torch.load(tmp_path / "run" / "run" / "last.pth", weights_only=True)
    assert last["step"] == 5
    survived()


def test_a_rank_that_waits_for_a_file_is_named_with_the_place(phantoms, tmp_path, tally):
    """A file system that does not answer any more, as a pipe into which nobody writes."""
    survived = tally("a rank hangs reading a file")
    data = tmp_path / "data"
    shutil.copytree(phantoms, data)
    more = ["--steps", "4000", "--log_interval", "1", "--val_interval", "5000", "--timeout", "0.2"]
    launched = Launched(
        tmp_path / "run", "train_vae", vae_options(data, "run", *more), *standalone(2)
    )
    launched.until("step 3/4000  train")
    image = sorted((data / "images").iterdir())[0]
    os.mkfifo(data / "pipe")
    os.replace(data / "pipe", image)
    assert launched.end() != 0
    found = re.search(r"rank (\d) hangs at fibldm/\w+\.py:\d+", launched.output())
    assert found, launched.output()
    survived()
