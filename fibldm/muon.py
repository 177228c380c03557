"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, "Muon: an optimizer for
hidden layers in neural networks"), and AdamW for what is no matrix.
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, which takes singular values to about 1
NEWTON_SCHULZ = 5  # iterations
MOMENTUM = 0.95
BETAS, EPSILON = (0.9, 0.95), 1e-8  # of AdamW
RMS = 0.2  # of an update: AdamW's, so that one learning rate serves both (arXiv 2502.16982)
LEAST_SIDE = 16  # a convolution with fewer channels in or out is hardly a matrix


def orthogonalize(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: (m, n) -> (m, n).

    Singular values become 0.7 to 1.2, but for those that are tiny beside the largest, which only
    grow 480-fold; their vectors stay (Newton-Schulz iteration). Each
    iteration multiplies by a polynomial of the Gram matrix, so that all of them are done on that
    one, which is small where m and n differ.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = None
    for left in reversed(range(NEWTON_SCHULZ)):
        factor = torch.addmm(a * identity + b * gram, gram, gram, alpha=c)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    x = product @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Muon for weights whose first two sides are both at least LEAST_SIDE, AdamW for all else.

    A convolution's weight (out, in, k, k) is taken as a matrix (out, in * k * k). So the widths
    decide: the first and last convolutions of a network are mostly AdamW's. One learning rate
    serves both.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.01) -> None:
        matrices, others = [], []
        for weight in model.parameters():
            hidden = weight.ndim >= 2 and min(weight.shape[:2]) >= LEAST_SIDE
            (matrices if hidden else others).append(weight)
        groups = [{"params": matrices, "matrix": True}, {"params": others, "matrix": False}]
        super().__init__([g for g in groups if g["params"]], {"lr": lr, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step along the gradients; parameters without one stay as they are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["decay"])
                    update = self._muon(weight) if group["matrix"] else self._adam(weight)
                    weight.add_(update, alpha=-group["lr"])

    def _muon(self, weight: Tensor) -> Tensor:
        state, gradient = self.state[weight], weight.grad
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov's
        scale = RMS * max(ahead.shape) ** 0.5
        return scale * orthogonalize(ahead).view(weight.shape)

    def _adam(self, weight: Tensor) -> Tensor:
        state, gradient = self.state[weight], weight.grad
        if not state:
            state["mean"], state["square"] = torch.zeros_like(weight), torch.zeros_like(weight)
            state["step"] = torch.zeros(())
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(gradient.square(), 1 - BETAS[1])
        corrections = [1 - beta ** float(state["step"]) for beta in BETAS]
        spread = (state["square"] / corrections[1]).sqrt() + EPSILON
        return state["mean"] / corrections[0] / spread
