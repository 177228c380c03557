"""Types of options, and how a script ends: with one message and the right exit code."""

import argparse
import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_vae
from fibldm import cli, distributed
from fibldm.batches import Plan
from fibldm.cli import STOPPED, duration, out_of_memory, run_script

INF = ("nan", "inf", "-inf", "1e999")


@pytest.mark.parametrize(
    ("kind", "right", "wrong", "expected"),
    [
        (cli.positive, ("1", "70"), ("0", "-1", "1.5", "x", ""), "whole number of at least 1"),
        (cli.count, ("0", "3"), ("-1", "2.0", "nan"), "whole number of at least 0"),
        (cli.integer, ("0", "-3"), ("1.5", str(2**63)), "at most 64 bits"),
        (cli.positive_float, ("1e-9",), ("0", "-1", *INF), "a number above 0"),
        (cli.not_negative, ("0", "1e-6"), ("-1e-9", *INF), "a number of at least 0"),
        (cli.finite, ("-1000", "0"), (*INF, "x"), "a number"),
        (cli.fraction, ("0", "1"), ("1.01", "-0.1", *INF), "a number from 0 to 1"),
        (cli.worker_count, ("0", "5"), ("-1", "many"), "auto, or a whole number of at least 0"),
    ],
)
def test_types_say_what_they_expect(kind, right, wrong, expected):
    assert [kind(text) for text in right] == [float(text) for text in right]
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}'; expected .*{expected}"):
            kind(text)


def test_a_shift_in_pixels_is_told_in_its_unit(capsys):
    assert train_vae.parse_args([]).max_shift == 1 / 16
    assert train_vae.parse_args(["--latent_size", "8"]).max_shift == 1 / 8
    for pixels, share in (("16", "0.0625"), ("1", "0.00390625")):
        with pytest.raises(SystemExit):
            train_vae.parse_args(["--max_shift", pixels])
        said = capsys.readouterr().err
        assert "a share of the side" in said and "not pixels" in said
        assert f"{pixels} pixels of --image_size 256 are {share}" in said


@pytest.mark.parametrize(
    "words",
    [
        *("--warmup_steps -1", "--patience -1", "--num_workers -1", "--kl_weight -1"),
        *("--kl_weight nan", "--kl_weight inf", "--window nan 400", "--window 400 -1000"),
        *("--val_fraction 0.6 --test_fraction 0.4", "--seed 1e3", "--split_seed 0.5"),
        *("--balance_labels a=0.5 b=0.6", "--balance_labels fibrosis", "--balance_labels a=1 a=1"),
        *("--lr inf", "--ema_decay 1.1", "--max_shift -0.1", "--time_limit -5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        train_vae.parse_args(words.split())
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err


def test_weights_of_classes_have_one_spelling():
    """So that a run may be resumed with them in another order."""
    for words, expected in (
        ([], None),
        (["--balance_labels"], []),
        (["--balance_labels", "normal=.50", "fibrosis=5e-1"], ["fibrosis=0.5", "normal=0.5"]),
        (["--balance_labels", "a=b=0.75", "two words=0.25"], ["a=b=0.75", "two words=0.25"]),
    ):
        args = train_vae.parse_args(words)
        assert args.balance_labels == expected
        assert Plan.of(vars(args)).balance_labels == expected


def test_auto_is_the_cores_that_a_process_has(monkeypatch):
    monkeypatch.setattr(cli.os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert cli.worker_count("auto") == 12
    for processes, expected in ((4, 3), (5, 2), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert cli.worker_count("auto") == expected
    monkeypatch.delattr(cli.os, "sched_getaffinity")
    monkeypatch.setattr(cli.os, "cpu_count", lambda: None)
    assert cli.worker_count("auto") == 1


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
    said = out_of_memory(error, 64, 2)
    for words in ("80.0 GiB", "70.0", "1.0 are free", "12.00 GiB", "--grad_accum from 2 to 4"):
        assert words in said
    assert "4 slices at once instead of 8" in said and "--batch_size (64" in said
    assert "widths" in out_of_memory(error, 8, 2)
    assert "Lower --batch_size (16 slices at once, over 4 processes)" in out_of_memory(error, 16)
    assert out_of_memory(error) is not None and "Lower" not in out_of_memory(error)
    assert out_of_memory(RuntimeError("shape mismatch"), 8, 1) is None


NCCL = """NCCL error in: ../ProcessGroupNCCL.cpp:94, unhandled cuda error
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'"""


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", "CUDA error: out of"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "ALLOC"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "DEVICE_ALLOC"),
        (NCCL, "Cuda failure 2 'out of memory'"),
    ],
)
def test_out_of_gpu_memory_in_the_words_of_cudas_libraries(error, shown, monkeypatch):
    """Also where the GPU does not answer any more."""

    def fail(*_):
        raise RuntimeError("CUDA error: out of memory")

    for kind in RuntimeError, torch.AcceleratorError, torch.distributed.DistBackendError:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * 2**30)
        said = out_of_memory(kind(error), 64, 2)
        assert shown in said and "80.0 GiB" in said and "--grad_accum from 2 to 4" in said
        monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
        assert "out of GPU memory. " in out_of_memory(kind(error), 64, 2)


@pytest.fixture
def ended(monkeypatch):
    """The exit code that a script's main, which raises this, ends with."""

    def end(error: BaseException) -> int:
        codes = []
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr(distributed.os, "_exit", codes.append)

        def main(args):
            raise error

        run_script(main, argparse.Namespace)
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


def test_a_gpu_that_is_busy_or_of_another_kind_is_one_message(ended, capsys):
    busy = "CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might"
    assert ended(torch.AcceleratorError(busy)) == 1  # it may go well another time
    shown = capsys.readouterr().err
    assert "nvidia-smi" in shown and "same command" in shown and "Traceback" not in shown
    other = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"
    assert ended(RuntimeError(other)) == 2
    shown = capsys.readouterr().err
    assert "CUDA 12" in shown and "--device cpu" in shown and "Traceback" not in shown
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ended(RuntimeError("CUDA error: an illegal memory access was encountered"))


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


def test_names_are_printed_where_a_terminal_lacks_their_letters(tmp_path):
    code = "import argparse; from fibldm.cli import run_script; "
    code += "run_script(lambda args: print('Fibr\\xf6se'), argparse.Namespace)"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | plain, capture_output=True
    )
    assert done.returncode == 0 and done.stdout == b"Fibr\\xf6se\n"
