"""After the fault: the same command ends well, nothing is lost or done twice, and the decisions can be made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from campaign import Place, Table, tail

from bnn_driver.bayes.calibration import GammaCalibration
from bnn_driver.config import Config, read_config
from bnn_driver.loops.chain_update import energy_offset
from bnn_driver.loops.seeds import uniform
from bnn_driver.records import LabelledFrame
from bnn_driver.store.dataset import LabelStore
from bnn_driver.store.run import read_segments


def resumes(place: Place) -> None:
    """The same command brings the run to its end, and all books agree; what struck before is then survived."""
    code, said = place.end(place.start())
    assert code == 0, f"the same command ended with {code}:\n{said}\n{tail(place.run / 'log' / 'trainer.log')}"
    assert "Traceback" not in said, said
    check(place)


def check(place: Place) -> None:
    """The books of a run that has ended."""
    place.check_disk()
    labels = LabelStore(place.run / "labels").all()
    segments = [list(segment) for segment in read_segments(place.run / "events")]
    _labels_are_what_was_asked(place, labels, segments)
    _trajectory_is_complete(place)
    replay(read_config(place.config), labels, segments)
    for name in place.hits:
        Table.survive(name)
    place.hits.clear()


def _labels_are_what_was_asked(place: Place, labels: list[LabelledFrame], segments: list[list[dict[str, Any]]]) -> None:
    events = [event for segment in segments for event in segment]
    on_disk = [item.label.frame_id for item in labels]
    told = Counter(e["frame_id"] for e in events if e["kind"] == "label")
    assert told == Counter(on_disk), "every label has one event, and every such event its label"
    spool = place.run / "oracle" / "spool" / "done"
    assert {file.stem for file in spool.glob("*.json")} == set(on_disk), "nothing that was computed is left lying"
    assert not list((place.run / "oracle" / "pending").glob("*.json")), "nothing is left that was begun"
    decided = {(e["step"], e["bead"], e["criterion"]) for e in events if e["kind"] == "decision"}
    labelled = {(x.context["step"], x.context["bead"], x.context["criterion"]) for x in labels}
    assert labelled <= decided, "no label without a decision"
    begun = Counter(line.split()[1] for line in place.computed.read_text().splitlines() if line.startswith("begin"))
    assert set(on_disk) <= begun.keys()
    asked = {(e["step"], e["bead"]) for e in segments[-1] if e["kind"] == "decision" and e["ask"]}
    asked -= {(e["step"], e["bead"]) for e in segments[-1] if e["kind"] == "dropped"}
    moments = {(x.context["step"], x.context["bead"]) for x in labels}
    assert asked <= moments, f"asked at {asked - moments} without a label"


def _trajectory_is_complete(place: Place) -> None:
    rows = np.loadtxt(place.run / "ipi" / "simulation.out")
    assert rows[-1, 0] == place.steps
    assert set(rows[:, 0]) == set(range(place.steps + 1)), "no step is missing"
    assert np.isfinite(rows).all()


def replay(config: Config, labels: list[LabelledFrame], segments: list[list[dict[str, Any]]]) -> int:
    """Make every decision of the run again, from the labels and from what was recorded of the predictions.

    For runs whose only promise is the energy.  Returns: how many decisions.
    """
    by_id = {item.label.frame_id: item for item in labels}
    number = {item.label.frame_id: n for n, item in enumerate(labels)}
    told: set[str] = set()
    count = 0
    for segment in segments:
        # what a start finds on disk it takes in order of number; that includes labels whose event a kill had prevented
        opening = [e["frame_id"] for e in takewhile(lambda e: e["kind"] != "decision", segment) if e["kind"] == "label"]
        known = sorted(told | set(opening), key=number.__getitem__)
        seen = [by_id[i] for i in known]
        for event in segment:
            if event["kind"] == "label" and event["frame_id"] not in known:
                known.append(event["frame_id"])
                seen.append(by_id[event["frame_id"]])
            if event["kind"] == "decision":
                _decide_again(config, event, seen)
                count += 1
        told |= set(known)
    return count


def _decide_again(config: Config, event: dict[str, Any], seen: list[LabelledFrame]) -> None:
    if not seen:
        assert event["criterion"] == "first"
        assert event["ask"]
        return
    a, c = config.accuracy, config.calibration
    calibration = _calibrated(GammaCalibration(c.a, c.b, c.forgetting), seen)
    probability = float(calibration.probability_exceeds(np.array(event["energy_predictive_sd"]), a.energy))
    assert event["probability"] == pytest.approx(probability, rel=1e-9), event
    ask = probability > 1 - a.confidence
    audited = uniform(config.run.seed, "audit", event["step"], event["bead"]) < (config.audit.probability or 0)
    criterion = "energy" if ask else "audit" if audited else "none"
    assert (event["ask"], event["criterion"]) == (ask, criterion), event


def _calibrated(calibration: GammaCalibration, seen: Iterable[LabelledFrame]) -> GammaCalibration:
    items = list(seen)
    offset = energy_offset(items[0])
    for item in items:
        x = item.context
        if x["criterion"] != "first" and x["generation"] != 0:
            calibration = calibration.observe(x["predicted_energy"] - item.label.energy - offset, x["energy_predictive_sd"])
    return calibration
