"""torchrun that ends with the exit code of the stage it runs; launch.sh starts it.

By itself torchrun ends with 1 whatever its workers end with. With --max-restarts it also repeats a
user's mistake, and has no code for a run that stopped early, after which the next stage of a chain
must not start.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed import run
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api

from fibldm.cli import MISTAKE, STOPPED

GRACE = 300  # seconds that a step and a save may take after a signal
FINAL = {MISTAKE, STOPPED}  # another start would end with it again


class Agent(LocalElasticAgent):
    """torchrun's agent, which does not start workers again that have ended for good."""

    last: "Agent | None" = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        Agent.last = self

    def _monitor_workers(self, worker_group):
        result = super()._monitor_workers(worker_group)
        if FINAL & {failure.exitcode for failure in result.failures.values()}:
            self._remaining_restarts = 0
        return result

    def codes(self) -> set[int]:
        """The exit codes of this node's workers; one that is still there is killed."""
        if self._pcontext is None:
            return set()
        workers = [handler.proc for handler in self._pcontext.subprocess_handlers.values()]
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
        return {worker.wait() for worker in workers}


def main(argv: list[str]) -> int:
    """Run `torchrun *argv`; return the exit code of its workers, 128 + N where signal N ended them.

    Torchrun's own report is left out: a worker has said what it had to say.
    """
    os.environ["FIBLDM_LAUNCHER"] = "1"  # see fibldm.cli.run_script
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    api.LocalElasticAgent = Agent
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
    except RendezvousError as error:
        what = f"{type(error).__name__} {error}".strip()
        sys.stderr.write(f"error: the other nodes have ended, see what they say ({what})\n")
        code = 1
    return max(FINAL & Agent.last.codes(), default=code) if Agent.last else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
