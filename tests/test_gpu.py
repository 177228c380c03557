"""The stages on a GPU that is only pretended: no mixed devices, and one wait for it a step."""

import itertools

import pytest
import torch
from conftest import controlnet_options, sample_options, unet_options, vae_options
from pretended_gpu import of_a_step, pretended_gpu

import sample
import train_controlnet
import train_ldm_unet
import train_vae
from fibldm.samplers import SAMPLERS
from fibldm.unet import UNet

pytestmark = pytest.mark.usefixtures("without_weights")
FLAGS = "tolist at guard.py"  # are loss and gradients finite, must one stop, is a file bad
STEPS = ["--device", "cuda", "--log_interval", "99", "--val_interval", "99", "--grad_accum", "2"]


@pytest.fixture
def stage(stages, phantoms, tmp_path):
    """A function (name, more options) -> a function of the steps, which runs that stage."""
    inputs = {
        "vae": (train_vae, lambda folder, *more: vae_options(phantoms, folder, *more)),
        "unet": (train_ldm_unet, lambda folder, *more: unet_options(stages, folder, *more)),
        "controlnet": (
            train_controlnet, lambda folder, *more: controlnet_options(stages, folder, *more)
        ),
        "sample": (sample, lambda folder, *more: sample_options(stages, folder, *more)),
    }  # fmt: skip

    numbers = itertools.count()

    def make(name: str, *more: str):
        script, options = inputs[name]

        def run(steps: int) -> None:
            folder = tmp_path / f"{name}_{next(numbers)}"
            words = options(folder, *more, "--steps", str(steps))
            script.main(script.parse_args(words))

        return run

    return make


def test_the_pretended_gpu_refuses_and_counts_what_a_real_one_does():
    with pretended_gpu() as gpu:
        x, y = torch.ones(3).to("cuda"), torch.ones(3)
        assert x.device == torch.device("cuda", 0) and (x + torch.tensor(1.0)).device == x.device
        z = x.clone().requires_grad_()
        (2 * z).sum().backward()
        assert z.grad.device == x.device and z.grad.tolist() == [2, 2, 2]
        for mix in (lambda: x + y, lambda: torch.cat([x, y]), lambda: torch.stack([y, x])):
            with pytest.raises(RuntimeError, match="cuda:0 and on the CPU"):
                mix()
        gpu.waits.clear()
        y.pin_memory().to("cuda", non_blocking=True)
        assert gpu.waits.total() == 0
        for wait in (
            lambda: float(x.sum()), lambda: bool(x.any()), x.tolist, x.cpu, lambda: y.to("cuda"),
            lambda: torch.zeros(3).to("cuda", non_blocking=True), lambda: x[x > 0],
            lambda: x.copy_(y), lambda: torch.tensor([True], device="cuda"),
        ):  # fmt: skip
            gpu.waits.clear()
            wait()
            assert gpu.waits.total() == 1
        assert gpu.operations.kernels < gpu.operations.dispatches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vae", "unet", "controlnet"])
def test_a_step_of_training_waits_once_for_its_flags(stage, name, precision):
    _, _, waits = of_a_step(stage(name, *STEPS, "--precision", precision), 2, 5)
    assert len(waits) == 1 and next(iter(waits)).startswith(FLAGS), waits
    assert waits.total() == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_sampling_does_not_wait_and_denoises_once(stage, stages, sampler, monkeypatch):
    calls, forward = [], UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *args: calls.append(1) or forward(*args))
    more = ["--latent_data_dir", str(stages / "latents"), "--num_samples", "4"]
    more += ["--device", "cuda", "--sampler", sampler, "--guidance_rescale", "0.5"]
    _, _, waits = of_a_step(stage("sample", *more), 3, 6)
    assert waits == {}
    assert len(calls) == 3 + 6  # contour and guidance in one batch


def test_weights_are_cast_once_for_all_steps(stage, stages):
    """By autocast they would be at each step, all of them."""
    more = ["--latent_data_dir", str(stages / "latents"), "--num_samples", "4", "--device", "cuda"]
    kernels = {
        precision: of_a_step(stage("sample", *more, "--precision", precision), 3, 6)[1]
        for precision in ("fp32", "bf16")
    }
    assert kernels["bf16"] < 1.5 * kernels["fp32"], kernels


def test_memory_is_not_filled_before_it_is_used(stage):
    """Deterministic algorithms would fill each new tensor, by a kernel of its own."""
    with pretended_gpu():
        stage("vae", *STEPS)(1)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
