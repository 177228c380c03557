"""Which of several processes hangs: each says how far it is, and all watch each other."""

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

ROOT = Path(__file__).parents[1]


class State(NamedTuple):
    """How far a rank is: `idle` seconds since it has done anything, `place` a line of code."""

    beats: int
    marks: int
    idle: float
    place: str


class Heartbeat(threading.Thread):
    """A thread that ends its process, naming the rank at fault, when nothing moves any more.

    `marks` counts the places where all ranks wait for each other that this rank has come to: those
    that wait are ahead of the rank they wait for. `work` counts what it does in between, so that
    one that is slow is not taken for one that hangs. One that is stopped, or whose machine is
    gone, does not beat at all. Works with any backend, and where a collective call would wait
    for ever: it talks through the store at MASTER_ADDR and MASTER_PORT, by keys below `start`.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, start: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.ranks, self.timeout = rank, range(world_size), timeout
        self.marks, self.work, self.idle = 0, 0, 0.0
        self.pause = min(10.0, timeout / 10)  # seconds between beats
        self.keys = [f"{start}/beat/{r}" for r in self.ranks]
        self.verdict = f"{start}/verdict"  # of the first to find out, which is heard
        self.main = threading.main_thread().ident
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=max(60, timeout))
        )
        self.beats = 0
        self.beat()
        self.start()

    def beat(self) -> None:
        self.beats += 1
        state = f"{self.beats} {self.marks} {self.idle:.3f} {self.place()}"
        self.store.set(self.keys[self.rank], state)

    def place(self) -> str:
        """The line of this project that the main thread is in."""
        frame = sys._current_frames().get(self.main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and path.name != "distributed.py":
                return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "?"

    def look(self) -> dict[int, State]:
        """What each rank said last."""
        found = {}
        for rank, key in zip(self.ranks, self.keys, strict=True):
            beats, marks, idle, place = self.store.get(key).decode().split(" ", 3)
            found[rank] = State(int(beats), int(marks), float(idle), place)
        return found

    def run(self) -> None:
        done, moved, before = None, time.monotonic(), None
        try:
            while True:
                if done != (self.marks, self.work):
                    done, moved, before = (self.marks, self.work), time.monotonic(), None
                self.idle = time.monotonic() - moved
                self.beat()
                if self.idle > self.timeout:
                    if before is not None:
                        self.judge(before, self.look())
                    before = self.look()
                time.sleep(3 * self.pause if before is not None else self.pause)
        except RuntimeError:  # the store's process is gone, and the group with it
            return

    def judge(self, before: dict[int, State], after: dict[int, State]) -> None:
        """Where a rank is at fault say so, and end at once: the main thread may never answer."""
        silent = [r for r in self.ranks if before[r].beats == after[r].beats and r != self.rank]
        still = [r for r in self.ranks if after[r].idle > 0.9 * self.timeout]
        behind = [r for r in still if after[r].marks < max(s.marks for s in after.values())]
        if not silent and not behind and len(still) < len(self.ranks):
            return  # someone is at work
        if self.store.compare_set(self.verdict, "", str(self.rank)).decode() != str(self.rank):
            os._exit(1)
        if silent:
            who = [f"rank {r} does not answer (last seen at {after[r].place})" for r in silent]
        elif behind:
            who = [f"rank {r} hangs at {after[r].place}" for r in behind]
        else:
            who = ["all ranks wait at the same place: is the network between them down?"]
        sys.stderr.write(
            f"error (rank {self.rank}): no progress in {self.timeout / 60:g} minutes (--timeout): "
            f"{'; '.join(who)}. The last checkpoint is as it was: run the same command again\n"
        )
        sys.stderr.flush()
        os._exit(1)
