"""One process without torchrun: the same calls. Two processes are tested in test_pipeline.py."""

import os

import pytest
import torch

from fibldm import distributed


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
