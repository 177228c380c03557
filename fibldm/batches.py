"""Which slices and which noise each step of a training takes, on any number of processes."""

import argparse
import copy
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fibldm import distributed


def item_generator(seed: int, stream: str, step: int, item: int) -> np.random.Generator:
    """Random numbers that depend on these four alone: on no batch, rank or earlier draw.

    Counter-based (Philox; Salmon et al. 2011), so that any item's numbers can be drawn directly.
    """
    key = [seed % 2**64, int.from_bytes(stream.encode()[:8], "big")]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, step, item]))


def item_noise(
    seed: int, stream: str, step: int, items: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Standard normal noise (len(items), *shape), fp32, each item's its own."""
    draws = [
        item_generator(seed, stream, step, i).standard_normal(tuple(shape), np.float32)
        for i in items
    ]
    return torch.from_numpy(np.stack(draws))


def item_uniform(seed: int, stream: str, step: int, items: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), (len(items), count), fp32, each item's its own."""
    draws = [item_generator(seed, stream, step, i).random(count, np.float32) for i in items]
    return torch.from_numpy(np.stack(draws))


def seed_dropout(seed: int, step: int, items: Sequence[int]) -> None:
    """Let dropout's masks follow from these: a resumed run drops as one that was not interrupted.

    They belong to a whole part: another number of processes, or of parts, has other masks.
    """
    torch.manual_seed(int(item_generator(seed, "dropout", step, items[0]).integers(2**63)))


def part_size(args: argparse.Namespace) -> int:
    """Slices that a process takes at once; ValueError where --batch_size does not divide so."""
    parts = distributed.world_size() * args.grad_accum
    if args.batch_size % parts:
        raise ValueError(
            f"--batch_size {args.batch_size} is over all processes: expected a multiple of "
            f"{distributed.world_size()} processes x --grad_accum {args.grad_accum}"
        )
    return args.batch_size // parts


def next_row(row: int, rows: Sequence[int], left_out: Collection[int]) -> int:
    """The first of `rows` after `row`, going round, that is not left out."""
    place = rows.index(row)
    return next(r for r in (*rows[place + 1 :], *rows[:place]) if r not in left_out)


class Batches:
    """This rank's parts of the global batches of steps start + 1 to steps, in order.

    The data are shuffled in each epoch by (seed, epoch). Position p of step s's batch of B slices
    is item (s - 1) * B + p of the stream of epochs, whatever the number of processes.
    Iterating gives lists of rows, `grad_accum` of them a step: the order a DataLoader takes;
    `parts` gives their step and their positions too. Where a row is left out, the next one in the
    order of `rows` that is not takes its places.
    """

    def __init__(
        self,
        rows: Sequence[int],
        args: argparse.Namespace,
        start: int,
        left_out: Sequence[int] = (),
    ) -> None:
        self.rows, self.args, self.start = np.asarray(rows), args, start
        self.left_out = set(left_out)
        self.size = part_size(args)
        self.first = distributed.rank() * self.size * args.grad_accum
        self._epoch, self._order = -1, self.rows

    def row(self, item: int) -> int:
        """The row at a place in the endless stream of shuffled epochs."""
        epoch, place = divmod(item, len(self.rows))
        if epoch != self._epoch:
            order = item_generator(self.args.seed, "order", epoch, 0).permutation(len(self.rows))
            self._epoch, self._order = epoch, self.rows[order]
        row = int(self._order[place])
        return row if row not in self.left_out else next_row(row, self.rows.tolist(), self.left_out)

    def leave_out(self, rows: Sequence[int]) -> None:
        """Take no more of these rows; ValueError where none would be left."""
        self.left_out |= set(rows)
        if self.left_out >= set(self.rows.tolist()):
            raise ValueError("none of the slices to train on can be read")

    def rows_of(self, step: int) -> list[int]:
        """All rows of a step's batch, over all ranks, in the order of their positions."""
        mine = copy.copy(self)  # a thread may be taking rows from this one
        size = self.args.batch_size
        return [mine.row((step - 1) * size + position) for position in range(size)]

    def positions(self, part: int) -> range:
        """Positions in the global batch of one of this rank's parts (0 to grad_accum - 1)."""
        return range(self.first + part * self.size, self.first + (part + 1) * self.size)

    def parts(self) -> Iterator[tuple[int, range, list[int]]]:
        """Step, positions and rows of each part."""
        for step in range(self.start + 1, self.args.steps + 1):
            for part in range(self.args.grad_accum):
                offset, positions = (step - 1) * self.args.batch_size, self.positions(part)
                yield step, positions, [self.row(offset + p) for p in positions]

    def __iter__(self) -> Iterator[list[int]]:
        return (rows for _, _, rows in self.parts())

    def __len__(self) -> int:
        return (self.args.steps - self.start) * self.args.grad_accum
