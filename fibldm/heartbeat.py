"""Which of several processes hangs: each says how far it is, and all watch each other."""

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).parents[1]


class Heartbeat(threading.Thread):
    """A thread that ends its process, naming the rank at fault, when nothing moves any more.

    `marks` counts the places where all ranks wait for each other that this rank has come to. The
    ranks that wait are one ahead of the rank they wait for; one that is stopped, or whose machine
    is gone, does not beat at all. Works with any backend, and where a collective call would wait
    for ever: it talks through the store at MASTER_ADDR and MASTER_PORT.
    """

    def __init__(self, rank: int, world_size: int, timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.rank, self.ranks, self.timeout, self.marks = rank, range(world_size), timeout, 0
        self.pause = min(10.0, timeout / 10)  # seconds between beats
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.keys = [f"fibldm/{attempt}/{r}" for r in self.ranks]
        self.verdict = f"fibldm/{attempt}/verdict"  # of the first to find out, which is heard
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
        self.store.set(self.keys[self.rank], f"{self.beats} {self.marks} {self.place()}")

    def place(self) -> str:
        """The line of this project that the main thread is in."""
        frame = sys._current_frames().get(self.main)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and path.name != "distributed.py":
                return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return "?"

    def look(self) -> dict[int, tuple[int, int, str]]:
        """Beats, marks and place of each rank."""
        found = {}
        for rank, key in zip(self.ranks, self.keys, strict=True):
            beats, marks, place = self.store.get(key).decode().split(" ", 2)
            found[rank] = int(beats), int(marks), place
        return found

    def run(self) -> None:
        marks, moved = -1, time.monotonic()
        try:
            while True:
                if marks != self.marks:
                    marks, moved = self.marks, time.monotonic()
                self.beat()
                time.sleep(self.pause)
                if marks == self.marks and time.monotonic() - moved > self.timeout:
                    before = self.look()
                    self.beat()
                    time.sleep(3 * self.pause)
                    if marks == self.marks:
                        self.end(before, self.look())
        except RuntimeError:  # the store's process is gone, and the group with it
            return

    def end(self, before: dict, after: dict) -> None:
        """Say who is at fault, and end this process at once: its main thread may never answer."""
        if self.store.compare_set(self.verdict, "", str(self.rank)).decode() != str(self.rank):
            os._exit(1)
        silent = [r for r in self.ranks if before[r][0] == after[r][0] and r != self.rank]
        behind = [r for r in self.ranks if after[r][1] < max(state[1] for state in after.values())]
        if silent:
            who = [f"rank {r} does not answer (last seen at {after[r][2]})" for r in silent]
        elif behind:
            who = [f"rank {r} hangs at {after[r][2]}" for r in behind]
        else:
            who = ["all ranks wait at the same place: is the network between them down?"]
        sys.stderr.write(
            f"error (rank {self.rank}): no progress in {self.timeout / 60:g} minutes (--timeout): "
            f"{'; '.join(who)}. The last checkpoint is as it was: run the same command again\n"
        )
        sys.stderr.flush()
        os._exit(1)
