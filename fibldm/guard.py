"""The numbers of a training's step: those that are not finite, and the means of the log."""

import json
import math
from collections.abc import Collection

import torch
from torch import Tensor

from fibldm import distributed
from fibldm.batches import Batches, Plan
from fibldm.disk import replace_text
from fibldm.distributed import warn
from fibldm.journal import RunFolder


class Guard:
    """The numbers of the step under way, which must be finite on all ranks, and the log's means.

    Scalars stay on the device until they are asked for.
    """

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self.plan, self.folder, self.progress = plan, folder, folder.progress
        self.scalars: dict[str, list[Tensor]] = {}  # of the step under way
        self.sums: dict[str, Tensor] = {}  # of the steps taken since the last log line
        self.counts: dict[str, int] = {}
        self.unreadable: set[int] = set()  # rows of this rank

    def judge(self, grad_norm: Tensor, stop: bool) -> tuple[bool, ...]:
        """Whether on any rank a loss or a gradient is not finite, one must stop, a file is bad."""
        losses = torch.stack([value for values in self.scalars.values() for value in values])
        self.scalars["grad_norm"] = [grad_norm.detach().float()]
        flags = [~torch.isfinite(losses).all(), ~torch.isfinite(grad_norm)]
        flags += [flags[0].new_full((), noted) for noted in (stop, bool(self.unreadable))]
        counts = distributed.sum_over_ranks(torch.stack(flags).float())
        return tuple(count > 0 for count in counts.tolist())

    def accept(self) -> None:
        """Take the step's scalars into the means."""
        self.progress.bad_steps = 0
        for name, values in self.scalars.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(values[0])) + sum(values)
            self.counts[name] = self.counts.get(name, 0) + len(values)
        self.scalars = {}

    def refuse(self, step: int, batches: Batches, scaler: dict, overflow: bool) -> None:
        """Count and warn of a step that is skipped; ValueError after too many in a row.

        An overflow of fp16 is no error. `scaler`: the GradScaler's state, for the report.
        """
        self.progress.skipped += 1
        own = {name: [float(v) for v in values] for name, values in self.scalars.items()}
        self.scalars = {}
        if overflow:
            return
        by_rank = distributed.gather(own)
        bad = [n for n in own if not all(math.isfinite(v) for values in by_rank for v in values[n])]
        what, most = f"step {step}: {', '.join(bad)} not finite", self.plan.max_bad_steps
        self.progress.bad_steps += 1
        if (count := self.progress.bad_steps) < most:
            warn(f"{what}; it is skipped, as {count} in a row (--max_bad_steps {most})")
            return
        file = self.folder.path / "bad_batch.json"
        if distributed.is_main():
            found = [{n: list(map(str, v)) for n, v in values.items()} for values in by_rank]
            content = {"step": step, "rows": batches.rows_of(step), "seed": self.plan.seed}
            content |= {"scaler": scaler, "checkpoint_step": self.folder.saved_step}
            content |= {"values_by_rank": found}
            replace_text(file, json.dumps(content, indent=2) + "\n")
        distributed.barrier()
        raise ValueError(
            f"training diverged: {what}, and {most} steps in a row were so (--max_bad_steps). "
            f"{self.folder.where_saved()} {file} has the rows of the last batch, seed, values and "
            "scaler state. Lower --lr, or use --precision fp32 or bf16, in another --save_dir"
        )

    def leave_out(self, batches: Batches, unreadable: Collection[int]) -> None:
        """Take these rows no more; the same on all ranks. ValueError where there are too many."""
        found = sorted(set(unreadable) - set(self.progress.bad_images))
        if not found:
            return
        self.progress.bad_images += found
        batches.leave_out(found)
        count, most = len(self.progress.bad_images), self.plan.max_bad_images
        text = f"rows {found} of the table (from 0) cannot be read any more: {count} in all "
        text += f"(--max_bad_images {most})"
        if count > most:
            where = self.folder.where_saved()
            raise ValueError(f"{text}. {where} Repair them; the same command goes on")
        warn(f"{text}; other slices take their places")

    def pop_means(self) -> dict[str, float]:
        """Means over the ranks and the steps since the last call."""
        means = {n: float(distributed.mean(v)) / self.counts[n] for n, v in self.sums.items()}
        self.sums, self.counts = {}, {}
        if self.progress.skipped:
            means["skipped_steps"] = self.progress.skipped
        return means
