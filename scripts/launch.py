"""torchrun that ends with the exit code of the stage it runs; launch.sh starts it.

By itself torchrun ends with 1 whatever its workers end with. With --max-restarts it also repeats a
user's mistake, and has no code for a run that stopped early, after which the next stage of a chain
must not start. So a stage leaves the code that it ends with for good in the link FIBLDM_CODE.
"""

import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

GRACE = 300  # seconds that a step and a save may take after a signal


def main(argv: list[str]) -> int:
    """Run `torchrun *argv`; return the exit code of its workers, 128 + N where signal N ended them.

    Torchrun's own report is left out: a worker has said what it had to say.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "code"
        os.environ["FIBLDM_CODE"] = str(said)
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
        code = 0
        try:
            run.main(argv)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if code < 0:
                name = signal.Signals(-code).name
                sys.stderr.write(f"error: the process of rank {rank} was ended by {name}\n")
                code = 128 - code
        except SignalException as error:
            code = 128 + error.sigval
        return int(os.readlink(said)) if said.is_symlink() else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
