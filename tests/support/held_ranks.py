"""`dan-fast` under torchrun, whose rank 1 waits in the tenth iteration to be killed; started again it goes on."""

import os
import sys
import time
from typing import Any

from dan_fast.cli import main
from dan_fast.training import Trainer

if __name__ == "__main__":
    step, waits = Trainer.train_iteration, os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def held(trainer: Trainer, *given: Any) -> None:
        if waits and trainer.iterations_done == 9:
            time.sleep(600)
        step(trainer, *given)

    Trainer.train_iteration = held
    sys.exit(main())
