"""Logs one step with W&B offline, suspends W&B's own process and ends. Argument: a run folder."""

import os
import signal
import sys
from pathlib import Path

from megatron_paint.run.loggers import background, loggers, wandb
from tests.run.loggers.stand_ins import info, report


def main() -> None:
    wandb.FINISH_SECONDS = 2.0
    loggers.CLOSE_SECONDS = background.CLOSE_SECONDS = 3.0
    wandb.EXIT_SECONDS = 3.0
    opened = loggers.Loggers([wandb.WandbLogger(info(Path(sys.argv[1])))], samples_every=2)
    opened.open()
    opened.step(*report(1, **{"pass@4": 0.25}))
    (service,) = wandb.service_processes()
    os.kill(service, signal.SIGSTOP)
    opened.close("finished")


if __name__ == "__main__":
    main()
