"""Types of options, and how a script ends: with one message and the right exit code."""

import argparse
import errno
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from conftest import training_options as options

from fibldm import distributed
from fibldm.cli import STOPPED, duration, out_of_memory, run_script


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400)),
        ("2-01:00:01", 176401),
    ],
)
def test_time_limits_are_slurms(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "-5", "1:2:3:4", "x", "1-", "0:00:00", "1-2:3:4:5", "1h"]
)
def test_other_time_limits_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected minutes"):
        duration(text)


def test_out_of_gpu_memory_says_what_to_lower_with_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * 2**30)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB.")
    said = out_of_memory(error, options(batch_size=64, grad_accum=2))
    for words in ("80.0 GiB", "70.0", "1.0 are free", "12.00 GiB", "--grad_accum from 2 to 4"):
        assert words in said
    assert "4 slices at once instead of 8" in said and "--batch_size (64" in said
    assert "widths" in out_of_memory(error, options(batch_size=8, grad_accum=2))
    sampling = argparse.Namespace(batch_size=16)
    assert "Lower --batch_size (16 slices at once)" in out_of_memory(error, sampling)
    assert out_of_memory(RuntimeError("shape mismatch"), options()) is None


@pytest.fixture
def ended(monkeypatch):
    """The exit code that a script's main, which raises this, ends with."""

    def end(error: BaseException) -> int:
        codes = []
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(distributed.os, "_exit", codes.append)

        def main(args):
            raise error

        run_script(main, options)
        return codes[0]

    return end


@pytest.mark.parametrize(("restarts", "code"), [(None, STOPPED), ("0", STOPPED), ("3", 0)])
def test_a_stopped_run_has_its_own_code_but_is_not_restarted_by_torchrun(
    monkeypatch, restarts, code, ended
):
    monkeypatch.delenv("FIBLDM_LAUNCHER", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert ended(SystemExit(STOPPED)) == code
    assert ended(SystemExit(143)) == 143
    monkeypatch.setenv("FIBLDM_LAUNCHER", "1")
    assert ended(SystemExit(STOPPED)) == STOPPED


def test_what_may_pass_has_another_code_than_a_mistake(ended):
    assert ended(OSError(errno.ESTALE, "Stale file handle", "/data/latents.npy")) == 1
    assert ended(OSError(errno.EACCES, "Permission denied", "/data/latents.npy")) == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--steps is wrong"),
        OSError(28, "No space left on device", "/data/run"),
        MemoryError("--steps of 1e18 bytes"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 1 bytes"),
    ],
)
def test_mistakes_and_limits_are_one_message_and_code_2(error, ended, capsys):
    assert ended(error) == 2
    shown = capsys.readouterr().err
    assert ": error: " in shown and str(error).split("\n")[0] in shown
    assert ("free space, and run the same command again" in shown) is isinstance(error, OSError)
    assert "Traceback" not in shown


def test_an_error_of_the_program_keeps_its_traceback_and_ends_at_once(tmp_path):
    """Also while a process that decodes images is still there, which ignores signals."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from fibldm.datasets import load_batches
from fibldm.cli import run_script
def main(args):
    data = load_batches([{{"x": __import__("torch").zeros(1)}}] * 9, [[0]] * 9, 1)
    next(iter(data))
    held = iter(data)
    next(held)
    raise RuntimeError("a bug")
run_script(main, lambda: None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr
