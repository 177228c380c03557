"""Muon: orthogonal updates, one learning rate for all, and a state that resumes to the bit."""

import copy

import pytest
import torch
from torch import nn

from fibldm.optim import COEFFICIENTS, NEWTON_SCHULZ, RMS, Muon, orthogonalize


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 32, 3, padding=1), nn.SiLU(),
        nn.Conv2d(32, 1, 3, padding=1),
    )  # fmt: skip


def train(model: nn.Module, optimizer: Muon, steps: range) -> float:
    for step in steps:
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.roll(1, 3).square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix) @ vh.T
    values = found.diagonal()
    assert (values > 0.5).all() and (values < 1.3).all()
    torch.testing.assert_close(found, torch.diag(values), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        orthogonalize(1e-4 * matrix), orthogonalize(matrix), atol=1e-2, rtol=0
    )


def test_orthogonalize_agrees_with_the_plain_iteration_where_singular_values_are_tiny():
    """Its iterations on the Gram matrix save work; they must not lose the small directions."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 24, generator=generator))[0] for n in (24, 90))
    matrix = u @ torch.diag(torch.logspace(0, -4, 24)) @ v.T
    x = (matrix / matrix.norm()).double()
    for _ in range(NEWTON_SCHULZ):
        a, b, c = COEFFICIENTS
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix), x.float(), atol=1e-3, rtol=0)


def test_matrices_take_steps_of_adams_length_whatever_the_gradient():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, lr=1e-2, weight_decay=0.0)
    for weight in model.parameters():
        weight.grad = 1e-3 * torch.randn_like(weight)
    optimizer.step()
    moved = {
        n: float((w - before[n]).square().mean().sqrt()) for n, w in model.state_dict().items()
    }
    assert moved["2.weight"] == pytest.approx(1e-2 * RMS, rel=0.3)  # the hidden one: Muon
    assert moved["0.weight"] == pytest.approx(1e-2, rel=0.01)  # first and last: AdamW's first step
    assert moved["4.weight"] == pytest.approx(1e-2, rel=0.01)
    assert moved["2.bias"] == pytest.approx(1e-2, rel=0.01)


def test_a_matrix_follows_nesterovs_momentum():
    model = nn.Linear(20, 30, bias=False)
    optimizer = Muon(model, lr=1e-2, weight_decay=0.0)
    momentum = torch.zeros_like(model.weight)
    for step in range(3):
        before = model.weight.detach().clone()
        gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        expected = orthogonalize(0.05 * gradient + 0.95 * momentum) * RMS * 30**0.5
        torch.testing.assert_close((before - model.weight) / 1e-2, expected, atol=1e-3, rtol=0)


def test_what_is_no_matrix_is_stepped_as_by_adamw():
    """Against PyTorch's, on a model without hidden matrices."""
    torch.manual_seed(0)
    model = nn.Conv2d(1, 4, 3, padding=1)
    other = copy.deepcopy(model)
    ours = Muon(model, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(5):
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(model.bias, other.bias)


def test_it_resumes_to_the_bit(tmp_path):
    whole = network()
    train(whole, Muon(whole, lr=1e-2), range(6))
    first = network()
    optimizer = Muon(first, lr=1e-2)
    train(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", weights_only=True)
    second = network()
    optimizer = Muon(second, lr=1e-2)
    second.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns():
    model = network()
    first = train(network(), Muon(network(), lr=1e-2), range(1))
    assert train(model, Muon(model, lr=1e-2), range(60)) < 0.5 * first
