"""`accelerate launch` for a job of tasks/stage/launch.py: says in a file which processes failed.

python -m tasks.stage.launcher
"""

import logging
import os
import signal
import sys

from tasks.stage import launch, starter, warm
from tasks.stage.files import write_json


def main() -> int:
    """Start the processes of the job and wait until they have ended; 0 when all ended well."""
    job = launch.job()
    assert job is not None
    starter.watch(job.has_owner, lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: None)
    warm.offer(os.environ)
    logging.disable()  # the stage says what is to be said
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # of unused parameters torch warns where there are none
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args(job.arguments))
    except ChildFailedError as error:
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        write_json(job.folder / "failed.json", codes)
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # on the way out torch's handler would leave a traceback
    return 0


if __name__ == "__main__":
    code = warm.stand_in()
    sys.exit(main() if code is None else code)
