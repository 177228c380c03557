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
