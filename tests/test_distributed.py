"""One process without torchrun: the same calls; and who is named when nothing moves any more.

Two processes are tested in test_pipeline.py, real ones are stopped in chaos/test_cluster.py.
"""

import os

import pytest
import torch

from fibldm import distributed
from fibldm.distributed import Heartbeat, State


def test_one_process_needs_no_group():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.mean(value), value)
    assert distributed.gather("a") == ["a"]
    assert distributed.any_rank(True, torch.device("cpu")) is True
    module = torch.nn.Linear(1, 1)
    assert distributed.wrap(module, torch.device("cpu")) is module


@pytest.mark.parametrize(("count", "size"), [(10, 3), (2, 4), (0, 2), (7, 7)])
def test_shares_are_disjoint_complete_and_even(count, size, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("code", [0, 2, 75])
def test_leaving_keeps_the_exit_code_and_what_was_printed(code, capfd):
    if os.fork() == 0:
        print("the last word", end="")
        distributed.leave(code)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == code
    assert "the last word" in capfd.readouterr().out


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0"])
def test_unknown_devices_are_refused_by_name(device):
    with pytest.raises(ValueError, match=f"--device {device}: expected auto, cpu, cuda"):
        distributed.setup(device)


# A GPU that PyTorch cannot use is told, not left out in silence.


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with one GPU, or with none that PyTorch sees (card None)."""

    def make(card: tuple[int, int] | None, kernels: str = "", cuda: str | None = "13.0") -> None:
        driver = "The NVIDIA driver on your system is too old (found version 12040). Update it."

        def init() -> None:
            raise RuntimeError(driver)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(distributed, "GPU_FILES", (tmp_path / "no", tmp_path))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name, value in {
            "init": init,
            "is_available": lambda: card is not None,
            "device_count": lambda: 1,
            "get_device_capability": lambda index: card,
            "get_device_name": lambda index: "Tesla",
            "get_arch_list": kernels.split,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return make


NEW = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"


def test_auto_does_not_pass_over_a_gpu_in_silence(machine, monkeypatch, tmp_path):
    machine(None)
    with pytest.raises(ValueError, match=r"--device auto: .* is there.*too old \(found .*CUDA 12"):
        distributed.choose_device()
    with pytest.raises(ValueError, match="--device cpu"):
        distributed.choose_device("auto")
    with pytest.raises(ValueError, match=r"GPU 0 is asked for, 0 are visible.*too old"):
        distributed.choose_device("cuda")
    assert distributed.choose_device("cpu").type == "cpu"
    machine(None, cuda=None)
    with pytest.raises(ValueError, match="a build for CPUs alone; install PyTorch"):
        distributed.choose_device()
    monkeypatch.setattr(distributed, "GPU_FILES", (tmp_path / "no",))
    assert distributed.choose_device().type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is 0,1"):
        distributed.choose_device()


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_a_hidden_gpu_is_a_wish_for_the_cpu(machine, monkeypatch, hidden):
    machine(None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert distributed.choose_device().type == "cpu"


@pytest.mark.parametrize(
    ("card", "kernels", "fits"),
    [
        ((7, 0), NEW, False),
        ((7, 5), NEW, True),
        ((8, 9), NEW, True),
        ((12, 1), NEW, True),
        ((9, 0), "sm_80 sm_90a", True),
        ((11, 0), NEW, False),
        ((11, 0), "sm_80 compute_90", True),
        ((7, 0), "sm_80 compute_80", False),
    ],
)
def test_a_build_for_other_gpus_is_refused(machine, card, kernels, fits):
    machine(card, kernels)
    for device in "auto", "cuda", "cuda:0":
        if fits:
            assert distributed.choose_device(device) == torch.device("cuda:0")
            continue
        with pytest.raises(
            ValueError, match=rf"Tesla.* {card[0]}\.{card[1]}, .*{kernels}; install"
        ):
            distributed.choose_device(device)
    machine(card, "gfx90a", cuda=None)  # AMD's
    assert distributed.choose_device().type == "cuda"


# Heartbeat.


class Store:
    """Of the first who has a verdict."""

    def __init__(self, first: str = "0") -> None:
        self.first = first

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.first.encode()


class Ended(BaseException):
    pass


@pytest.fixture
def judge(monkeypatch, capsys):
    """What rank 0 of 3 says of (beats before, beats after, marks, idle) of each; None: nothing."""

    def end(code):
        raise Ended

    def ask(*ranks: tuple[int, int, int, float], first: str = "0") -> str | None:
        monkeypatch.setattr(distributed.os, "_exit", end)
        watch = object.__new__(Heartbeat)
        watch.rank, watch.ranks, watch.timeout, watch.verdict = 0, range(3), 60.0, "v"
        watch.store = Store(first)
        before, after = (
            {i: State(r[0 if old else 1], r[2], r[3], f"file.py:{i}") for i, r in enumerate(ranks)}
            for old in (True, False)
        )
        try:
            watch.judge(before, after)
        except Ended:
            return capsys.readouterr().err
        return None

    return ask


WAITS = (5, 8, 11, 70.0)


def test_a_rank_that_does_not_beat_is_named(judge):
    said = judge(WAITS, (4, 4, 10, 3.0), WAITS)
    assert "rank 1 does not answer (last seen at file.py:1)" in said and "1 minutes" in said


def test_a_rank_that_is_behind_and_idle_is_named_with_its_place(judge):
    said = judge(WAITS, WAITS, (5, 8, 10, 69.0))
    assert "rank 2 hangs at file.py:2" in said and "rank 1" not in said


def test_a_rank_that_is_behind_and_at_work_is_waited_for(judge):
    assert judge(WAITS, WAITS, (5, 8, 10, 2.0)) is None


def test_all_at_the_same_place_is_the_network(judge):
    assert "all ranks wait at the same place" in judge(WAITS, WAITS, WAITS)
    assert judge(WAITS, (5, 8, 11, 2.0), WAITS) is None


def test_only_the_first_verdict_is_heard(judge):
    assert judge(WAITS, (4, 4, 10, 3.0), WAITS, first="2") == ""


def test_a_rank_beats_several_times_between_the_two_looks_of_another(monkeypatch):
    """Both look equally long: a rank that beat only when it looks would seem silent by chance."""
    now, looks = [0.0], []

    class Waiting(Heartbeat):
        def beat(self):
            self.beats += 1

        def look(self):
            looks.append(self.beats)
            return {0: State(self.beats, 0, self.idle, "?")}

        def judge(self, before, after):
            raise RuntimeError

    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    watch = object.__new__(Waiting)
    watch.marks, watch.work, watch.idle, watch.beats = 0, 0, 0.0, 0
    watch.timeout, watch.pause = 12.0, 1.2
    watch.run()
    assert len(looks) == 2 and looks[1] - looks[0] >= 3
