"""Entry point of the trainer process: `python -m bnn_driver.loops.trainer_main CONFIG RUN`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

import numpy as np

from bnn_driver.config import read_config
from bnn_driver.errors import BnnError
from bnn_driver.loops.assembly import load_model, make_learner, use_threads
from bnn_driver.loops.trainer import end_with_parent, serve_updates
from bnn_driver.store.run import RunDirectory, read_json


def main() -> None:
    """Learn labels until the driver is gone."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends this process
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config_file, run = Path(sys.argv[1]), RunDirectory.existing(Path(sys.argv[2]))
    try:
        config = read_config(config_file)
        use_threads(config.trainer.threads)
        numbers = np.array(read_json(run.settings_file)["physics"]["numbers"])
        with run.lock("trainer"):
            model = load_model(config, config_file.parent, numbers, config.trainer.device)
            serve_updates(run, make_learner(model, config), config.trainer.update_retries, config.output.keep_generations)
    except BnnError as error:
        logging.getLogger(__name__).error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
