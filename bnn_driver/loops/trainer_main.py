"""Entry point of the trainer process: `python -m bnn_driver.loops.trainer_main RUN`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path

from bnn_driver.errors import BnnError
from bnn_driver.loops.parent import end_with_parent


def main() -> None:
    """Learn labels until the driver is gone; while another walker's trainer does so, stand by to take over."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends this process
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        _learn(Path(sys.argv[1]))
    except BnnError as error:
        logging.getLogger(__name__).error("%s", error)
        sys.exit(error.exit_code)


def _learn(path: Path) -> None:
    # imported here: it takes a moment, in which the driver may already be gone
    import numpy as np

    from bnn_driver.config import read_config
    from bnn_driver.store.run import RunDirectory, read_json

    run = RunDirectory.existing(path)
    with run.lock("trainer", wait=True):
        # imported now: torch and a model take hundreds of MiB, which a trainer that only stands by need not hold
        from bnn_driver.loops.assembly import load_model, make_distances, make_learner, settle
        from bnn_driver.loops.trainer import serve_updates

        config, settings = read_config(run.path / "bnn.toml"), read_json(run.settings_file)
        settle(config.trainer.threads)
        base, numbers = Path(settings["effective"]["base"]), np.array(settings["physics"]["numbers"])
        model = load_model(config, base, numbers, config.trainer.device)
        learner = make_learner(model.potential, model.noise, config.ensemble, config.run.seed)
        audits_at_once = config.ensemble.batch_size if config.trainer.max_lag else None
        distances = make_distances(model.potential, model.noise, config.ensemble)
        serve_updates(run, learner, config.trainer.update_retries, config.output.keep_generations, audits_at_once, distances)


if __name__ == "__main__":
    main()
