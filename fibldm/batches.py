"""A training's plan and progress; which slices and noise its steps take, on any number of ranks."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fibldm import distributed
from fibldm.optim import cooldown_start, learning_rate


def item_generator(seed: int, stream: str, step: int, item: int) -> np.random.Generator:
    """Random numbers that depend on these four alone: on no batch, rank or earlier draw.

    Counter-based (Philox; Salmon et al. 2011), so that any item's numbers can be drawn directly.
    """
    words = [seed % 2**64, int.from_bytes(stream.encode()[:8], "big")]
    key = np.array(words, np.uint64)  # NumPy would make floats of large ones, which are alike
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step, item]))


def item_generators(
    seed: int, stream: str, step: int, items: Sequence[int]
) -> Iterator[np.random.Generator]:
    """`item_generator` of each item, each before the next: one that is set anew costs less."""
    generator = item_generator(seed, stream, step, 0)
    state = generator.bit_generator.state
    for item in items:
        state["state"]["counter"][3] = item
        generator.bit_generator.state = state
        yield generator


def item_noise(
    seed: int, stream: str, step: int, items: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Standard normal noise (len(items), *shape), fp32, each item's its own."""
    draws = np.empty((len(items), *shape), np.float32)
    for draw, generator in zip(draws, item_generators(seed, stream, step, items), strict=True):
        generator.standard_normal(dtype=np.float32, out=draw)
    return torch.from_numpy(draws)


def item_uniform(seed: int, stream: str, step: int, items: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), (len(items), count), fp32, each item's its own."""
    draws = np.empty((len(items), count), np.float32)
    for draw, generator in zip(draws, item_generators(seed, stream, step, items), strict=True):
        generator.random(dtype=np.float32, out=draw)
    return torch.from_numpy(draws)


def shift_slices(x: Tensor, uniform: Tensor, most: int) -> Tensor:
    """Slices x (N, C, H, W) in [-1, 1], each moved by whole pixels, -most to most.

    uniform (N, 2) in [0, 1) says how far: 0 is `most` pixels up and left, 0.5 is not at all.
    Nothing is interpolated, so texture stays as it is. The free border becomes air, -1.
    """
    height, width = x.shape[2:]
    offsets = (uniform * (2 * most + 1)).long() - most
    moved = torch.full_like(x, -1.0)
    for source, target, (down, right) in zip(x, moved, offsets.tolist(), strict=True):
        kept = source[:, max(0, -down) : height - max(0, down)]
        kept = kept[:, :, max(0, -right) : width - max(0, right)]
        top, left = max(0, down), max(0, right)
        target[:, top : top + kept.shape[1], left : left + kept.shape[2]] = kept
    return moved


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a GPU copies it while it computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def seed_dropout(seed: int, step: int, items: Sequence[int]) -> None:
    """Make dropout's masks follow from these, so that a resumed run drops the same features.

    One seed serves a whole micro-batch: another number of processes or micro-batches has other
    masks.
    """
    torch.manual_seed(int(item_generator(seed, "dropout", step, items[0]).integers(2**63)))


def next_row(row: int, rows: Sequence[int], left_out: Collection[int]) -> int:
    """The first of `rows` after `row`, going round, that is not left out."""
    place = rows.index(row)
    return next(r for r in (*rows[place + 1 :], *rows[:place]) if r not in left_out)


@dataclass(frozen=True)
class Plan:
    """How long a run trains, at what rate, and when it logs, saves, validates and gives up.

    The names and their meaning are those of the options. Raises ValueError where the batch size
    does not divide among processes and micro-batches.
    """

    steps: int
    batch_size: int
    grad_accum: int = 1
    seed: int = 0
    lr: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    balance_labels: Sequence[str] | None = None  # NAME=WEIGHT; none of them: all classes alike
    log_interval: int = 50
    save_interval: int = 500
    val_interval: int = 1000
    patience: int = 0
    time_limit: float | None = None  # seconds
    keep_last: int = 1
    max_bad_steps: int = 10
    max_bad_images: int = 0
    no_preflight: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        count = distributed.world_size() * self.grad_accum
        if self.batch_size % count:
            raise ValueError(
                f"--batch_size {self.batch_size} is over all processes: expected a multiple of "
                f"{distributed.world_size()} processes x --grad_accum {self.grad_accum}"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Plan":
        """The plan that is among a script's options."""
        names = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    @property
    def cooling_from(self) -> int:
        """The last step before the learning rate cools down; 0: it does not."""
        return cooldown_start(self.steps) if self.lr_schedule == "cooldown" else 0

    @property
    def kept_at(self) -> int:
        """The step whose checkpoints are kept, for a longer training to go on from; 0: none.

        It is one that is logged anyhow, so that the longer training's log has the same rows.
        """
        return self.cooling_from - self.cooling_from % self.log_interval or self.cooling_from

    @property
    def micro_batch_size(self) -> int:
        """Slices that a process takes at once."""
        return self.batch_size // (distributed.world_size() * self.grad_accum)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.lr, self.warmup_steps, self.lr_schedule, self.steps)

    def validates_after(self, step: int) -> bool:
        return step > 0 and (step % self.val_interval == 0 or step == self.steps)

    def saves_after(self, step: int) -> bool:
        due = step % self.save_interval == 0 or step == self.kept_at
        return due or self.validates_after(step)

    def logs_after(self, step: int) -> bool:
        return step % self.log_interval == 0 or self.saves_after(step)


@dataclass
class Progress:
    """How far a run has come; last.pth keeps it beside the weights."""

    step: int = 0  # the last one that was taken
    best: float = float("inf")  # the lowest validation loss, of the snapshot that is kept
    copies: bool = True  # whether the samples of that snapshot copy patients
    worse: int = 0  # validations since then that were no better
    validated: int = 0  # the last step that was validated
    followed: int = 0  # the first step at which samples followed their contours; 0: not yet
    skipped: int = 0  # steps that were not taken, in all
    bad_steps: int = 0  # and in a row
    bad_images: list[int] = field(default_factory=list)  # rows whose images cannot be read
    cooling_from: int = 0  # the step after which the learning rate began to fall; 0: not yet

    def improve(self, loss: float, copies: bool = False) -> bool:
        """Whether a validation loss is the lowest so far; remembers it.

        A snapshot whose samples copy patients is never better than one whose samples do not.
        """
        best = bool(np.isfinite(loss)) and (copies, loss) < (self.copies, self.best)
        if best:
            self.best, self.copies, self.worse = loss, copies, 0
        else:
            self.worse += 1
        return best


class MicroBatch(NamedTuple):
    """The slices of a step that a process takes at once."""

    step: int
    positions: range  # in the step's batch
    last: bool  # of this process in this step: after it gradients are averaged over the ranks


class Batches:
    """This rank's micro-batches of the steps start + 1 to `steps`, in order.

    Each epoch is shuffled by (seed, epoch). Position p of step s's batch of B slices is item
    (s - 1) * B + p of the stream of epochs, whatever the number of processes. Iterating gives
    lists of rows, `grad_accum` of them a step, as a DataLoader takes them; `micro_batches` tells
    where they belong. Where a row is left out, the next one of `rows` that is not takes its place.
    """

    def __init__(
        self, rows: Sequence[int], plan: Plan, start: int = 0, left_out: Collection[int] = ()
    ) -> None:
        self.rows, self.plan, self.start = np.asarray(rows), plan, start
        self.size, self.left_out = plan.micro_batch_size, set(left_out)
        self._shuffled = -1, self.rows  # an epoch and its order: one pair, as threads share it

    def row(self, item: int) -> int:
        """The row at a place in the endless stream of shuffled epochs."""
        epoch, place = divmod(item, len(self.rows))
        known, order = self._shuffled
        if epoch != known:
            order = self.order(epoch)
            self._shuffled = epoch, order
        row = int(order[place])
        return row if row not in self.left_out else next_row(row, self.alike(row), self.left_out)

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch, in their order."""
        generator = item_generator(self.plan.seed, "order", epoch, 0)
        return self.rows[generator.permutation(len(self.rows))]

    def alike(self, row: int) -> list[int]:
        """The rows of which one takes the place of a row that is left out."""
        return self.rows.tolist()

    def rows_of(self, step: int, positions: range | None = None) -> list[int]:
        """Rows at these positions of a step's batch; without them those of all ranks, in order."""
        offset = (step - 1) * self.plan.batch_size
        return [self.row(offset + p) for p in positions or range(self.plan.batch_size)]

    def leave_out(self, rows: Collection[int]) -> None:
        """Take no more of these rows; ValueError where none would be left."""
        self.left_out |= set(rows)
        if self.left_out >= set(self.rows.tolist()):
            raise ValueError("none of the slices to train on can be read")

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step."""
        first = distributed.rank() * self.plan.grad_accum
        end = first + self.plan.grad_accum
        for number in range(first, end):
            positions = range(number * self.size, (number + 1) * self.size)
            yield MicroBatch(step, positions, number + 1 == end)

    def all_micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of all steps that are left."""
        for step in range(self.start + 1, self.plan.steps + 1):
            yield from self.micro_batches(step)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows_of(micro.step, micro.positions) for micro in self.all_micro_batches())

    def __len__(self) -> int:
        return (self.plan.steps - self.start) * self.plan.grad_accum
