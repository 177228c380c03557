"""Steps of training: mixed precision, Muon, learning rates, gradient norms, averaged weights."""

import contextlib
import copy
import math

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class Precision:
    """Automatic mixed precision: a context for the networks, and a GradScaler (fp16 alone)."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto" and device.type == "cuda":
            name = "bf16" if has_bf16() else "fp16"
        self.name = "fp32" if name == "auto" else name
        torch.backends.cudnn.allow_tf32 = self.name != "fp32"
        self.device = device
        self.dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model for many calls of inference: autocast would cast frozen weights at each of them.

        It is a copy whose convolutions and linear maps are cast once, or in fp32 the model itself.
        """
        if self.dtype is None:
            return model
        model = copy.deepcopy(model)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(self.dtype)
        return model

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


SCHEDULES = ("constant", "cosine", "cooldown")
COOLDOWN = 5  # the last fifth of the steps cools down


def cooldown_start(steps: int) -> int:
    """The last step before the cooldown of a training of so many steps."""
    return steps - steps // COOLDOWN


def learning_rate(
    step: int, lr: float, warmup_steps: int = 0, schedule: str = "constant", steps: int = 0
) -> float:
    """The learning rate of a step, from 1 to `steps`: a linear warm-up to `lr`, then a schedule.

    "constant" keeps it. "cosine" lets it fall from the end of the warm-up, along half a cosine.
    "cooldown" keeps it, and lets it fall over the last fifth of the steps as 1 - sqrt(progress)
    (Hägele et al. 2024, arXiv 2405.18392). Both reach 0 at the last step.
    """
    warmth = min(1.0, step / max(1, warmup_steps))
    if schedule == "cosine" and step > warmup_steps:
        progress = (step - warmup_steps) / (steps - warmup_steps)
        return lr * (1 + math.cos(math.pi * progress)) / 2
    start = cooldown_start(steps)
    if schedule == "cooldown" and step > start:
        return lr * warmth * (1 - math.sqrt((step - start) / (steps - start)))
    return lr * warmth


def clip_gradients(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, most: float
) -> Tensor:
    """Clip the gradients to a norm of `most`; return it before that, not finite where one is."""
    scaler.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return torch.nn.utils.clip_grad_norm_(weights, most)


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, lr: float
) -> None:
    """Step along the clipped gradients at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.step(optimizer)


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """The optimizer of the diffusion stages."""
    weights = model.parameters()
    return torch.optim.AdamW(weights, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def clear_gradients(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """After a step, taken or skipped: adapt the scale of fp16, and forget the gradients."""
    scaler.update()
    optimizer.zero_grad(set_to_none=True)


class EMA:
    """Keeps `model`, the average that inference reads, beside a model in training.

    After step k (from 1): average = d * average + (1 - d) * weights, d = min(decay, (1+k)/(10+k)).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for average, weight in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(weight)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, which takes singular values to about 1
NEWTON_SCHULZ = 5  # iterations
MOMENTUM = 0.95
BETAS, EPSILON = (0.9, 0.95), 1e-8  # of AdamW
RMS = 0.2  # of an update: AdamW's, so that one learning rate serves both (arXiv 2502.16982)
LEAST_SIDE = 16  # a convolution with fewer channels in or out is hardly a matrix


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: (k, m, n) -> (k, m, n).

    Singular values become 0.7 to 1.2, but for those that are tiny beside the largest, which only
    grow 480-fold; their vectors stay (Newton-Schulz iteration). Each
    iteration multiplies by a polynomial of the Gram matrix, so that all of them are done on that
    one, which is small where m and n differ.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    gram = x @ x.mT
    norm = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-7
    gram = gram / norm.square()
    identity = a * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = None
    for left in reversed(range(NEWTON_SCHULZ)):
        factor = torch.baddbmm(identity + b * gram, gram, gram, alpha=c)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    x = product / norm @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for weights whose first two sides are both at least LEAST_SIDE, AdamW for all else.

    A convolution's weight (out, in, k, k) is taken as a matrix (out, k * k * in). So the widths
    decide: the first and last convolutions of a network are mostly AdamW's. One learning rate
    serves both. Matrices of one shape are orthogonalized at once: a GPU would wait for Python.
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
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                update = self._muon if group["matrix"] else self._adamw
                update(weights, [weight.grad for weight in weights], group["lr"], group["decay"])

    def _muon(
        self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float
    ) -> None:
        momenta = self._states(weights, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = list(torch._foreach_lerp(gradients, momenta, MOMENTUM))  # Nesterov's
        stacks: dict[torch.Size, list[int]] = {}
        for i, weight in enumerate(weights):
            stacks.setdefault(weight.shape, []).append(i)
        for places in stacks.values():
            # Channels last, as weights lie in memory: the order of columns changes nothing.
            rows = torch.stack([ahead[i].movedim(1, -1) for i in places])
            found = orthogonalize(rows.flatten(2))
            found *= RMS * max(found.shape[1:]) ** 0.5
            for i, update in zip(places, found.view(rows.shape).movedim(-1, 2), strict=True):
                ahead[i] = update
        torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_add_(weights, ahead, alpha=-lr)

    def _adamw(
        self, weights: list[Tensor], gradients: list[Tensor], lr: float, decay: float
    ) -> None:
        means, squares, steps = (self._states(weights, n) for n in ("mean", "square", "step"))
        adamw_(
            weights, gradients, means, squares, [], steps, foreach=True, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=decay, eps=EPSILON, maximize=False,
        )  # fmt: skip

    def _states(self, weights: list[Tensor], name: str) -> list[Tensor]:
        """What is kept of each weight under this name; at first zeros. Steps stay on the CPU."""
        for weight in weights:
            if name not in self.state[weight]:
                zeros = torch.zeros(()) if name == "step" else torch.zeros_like(weight)
                self.state[weight][name] = zeros
        return [self.state[weight][name] for weight in weights]
