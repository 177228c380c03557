"""Run a script in a process of its own that is killed: at a time, before a write, or within one."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train_vae", "encode_dataset", "train_ldm_unet", "train_controlnet", "sample")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR

# A server that has imported the scripts once, and forks a process for each run.
context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Death:
    """`seconds` after the start, or at the `event`-th change of the folder: before it, or, where it
    opens a file, in the middle of the write that takes the file beyond `size` bytes.
    """

    seconds: float | None = None
    event: int | None = None
    size: int | None = None


def draw_death(generator: random.Random, seconds: float, events: int) -> Death:
    """A third at any time, a third before a change, a third within a write."""
    kind = generator.randrange(3)
    if kind == 0:
        return Death(seconds=generator.uniform(0, seconds))
    event = generator.randrange(events)
    return Death(event=event, size=int(10 ** generator.uniform(0, 6)) if kind == 2 else None)


def child(script: str, arguments: list[str], folder: str, death: Death, count: object) -> None:
    """The process that is killed; `count` is raised by each change of the folder."""
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.argv = [f"{script}.py", *arguments]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the process's end)
    sys.stderr = open(f"{folder}.log", "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    os.environ["TORCH_HOME"] = f"{folder}.weights"  # none are found

    def watch(name: str, details: tuple) -> None:
        opened = name == "open" and isinstance(details[2], int) and details[2] & WRITES
        if not opened and name not in CHANGES:
            return
        path = details[0]
        if isinstance(path, int) or Path(folder) not in Path(os.fsdecode(path)).absolute().parents:
            return
        number, count.value = count.value, count.value + 1
        if number == death.event:
            if death.size is None or not opened:
                os.kill(os.getpid(), signal.SIGKILL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (death.size, resource.RLIM_INFINITY))

    import torch

    from fibldm.cli import run_script

    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
    module = __import__(script)
    sys.addaudithook(watch)
    run_script(module.main, module.parse_args)


def start(script: str, arguments: list[str], folder: Path, death: Death = Death()):
    """The process and its count of changes."""
    context.set_forkserver_preload(["torch", "numpy", "scipy.ndimage", *SCRIPTS])
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    count = context.Value("i", 0)
    process = context.Process(target=child, args=(script, arguments, str(folder), death, count))
    process.start()
    return process, count


def run(script: str, arguments: list[str], folder: Path, death: Death = Death()):
    """Run to its end or death: exit code (negative: of a signal), seconds, changes."""
    begun = time.monotonic()
    process, count = start(script, arguments, folder, death)
    process.join(death.seconds)
    if process.is_alive() and death.seconds is not None:
        process.kill()
    process.join(300)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"{script} hangs: see {folder}.log")
    return process.exitcode, time.monotonic() - begun, count.value


def contents(folder: Path) -> dict[str, object]:
    """What a folder holds, to the bit, but for times: images_per_s, and TensorBoard's own file."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            continue
        if "tensorboard" in path.parts:
            name = str(path.parent.relative_to(folder))
            found[name] = found.get(name, 0) + 1
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                row.pop("train/images_per_s", None)
            found[name] = json.dumps(rows)
        else:
            found[name] = path.read_bytes()
    return found


def differences(expected: dict, found: dict) -> list[str]:
    """The names of the files that one folder has and the other has not, or otherwise."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


@contextlib.contextmanager
def one_thread():
    """The processes of the server compute on one thread, as its order of sums is theirs."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
