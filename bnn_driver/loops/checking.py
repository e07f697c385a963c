"""`check`: everything that a run needs, tried without running, and with --label the oracle too; says what a run would do and cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from torch import Tensor

from bnn_driver.config import Config, read_config
from bnn_driver.errors import ConfigError, ModelError
from bnn_driver.executor_config import TrainerSettings
from bnn_driver.ipi.addresses import check_one_each
from bnn_driver.ipi.simulation import IpiInput
from bnn_driver.loops.assembly import (
    Model,
    foundation_generation,
    load_model,
    make_distances,
    make_ensemble,
    make_learner,
    make_policy,
    physics,
    read_system,
    settle,
)
from bnn_driver.loops.chain_update import update
from bnn_driver.loops.consistency import MODEL_TOLERANCE, model_deviation, model_line
from bnn_driver.loops.findings import RunState, batch_hint, input_findings, run_state, socket_line
from bnn_driver.loops.trial import label_trial
from bnn_driver.loops.walltime import find_end
from bnn_driver.oracle import Oracle, absolute_paths, fingerprint, load_oracle
from bnn_driver.potential.ensemble import Ensemble
from bnn_driver.records import Frames, LabelledFrame
from bnn_driver.units import KCAL_PER_MOL

Say = Callable[[str, str], None]
"""Prints one finding: its name, and the text."""

WARM_UP, TIMED = 2, 5
"""Evaluations before and for the time of one."""
CHAIN_WARM_UP, CHAIN_TIMED = 5, 20
"""Steps of the chains, likewise."""


def check_session(config_file: Path, say: Say, *, label: bool = False, walker: str = "") -> None:
    """Try all that can be tried without running.

    Args: walker: one of [ipi.walkers]; empty: all of them.   say: hears of each finding as soon as it is there.
        label: also have the oracle label the start structure and displaced copies of it; the labels go to the run directory's
        spool, so a run does not compute them again.
    Raises: what `run` would raise for the same files; OracleInconsistent when energies, forces and stress do not belong together.
    """
    config, base = read_config(config_file), config_file.absolute().parent
    settle(config.potential.threads)
    names = [walker] if walker else list(config.ipi.walkers) or [""]
    systems = {name: read_system(config, base, name) for name in names}
    frames, ipi_input = systems[names[0]]
    _say_system(config, frames, say)
    _check_walkers(systems)
    for name, (_, found) in systems.items():
        _say_ipi(config, found, partial(_of_walker, say, name))
    options = absolute_paths(config.oracle.kind, config.oracle.options, base)
    oracle = load_oracle(config.oracle.kind, options)
    oracle.check(frames)
    make_policy(config, frames.numbers, 0.0)
    model = load_model(config, base, frames.numbers, config.potential.device)
    ensemble = make_ensemble(model, foundation_generation(model, config.ensemble.members), config)
    _say_model(config, model, ensemble, frames, say)
    _say_oracle(config, oracle, say)
    run_folder = (base / config.run.directory).absolute()
    facts = physics(config, frames, model, oracle.physics(), fingerprint(oracle))
    states = {name: run_state(config, base, facts, found, name) for name, (_, found) in systems.items()}
    state = states[names[0]]
    step_seconds = _seconds_per_step(ensemble, frames, ipi_input)
    label_seconds, update_seconds = state.label_seconds, state.update_seconds
    if label:
        item = label_trial(config, options, base, oracle, frames, ensemble.predict(frames), run_folder, say)
        label_seconds = item.label.seconds
        device = config.trainer.device
        if config.trainer.executor == "parsl" and device != config.potential.device:
            say("trainer", f"an update was not timed: {device} is that of its job")
        else:
            model = model if device == config.potential.device else load_model(config, base, frames.numbers, device)
            update_seconds = update_seconds or _update_seconds(config, model, item)
    _say_cost(config, ipi_input, state, step_seconds, label_seconds, update_seconds, say)
    for name, (_, found) in systems.items():
        _say_plan(found, states[name], partial(_of_walker, say, name))
    end = find_end(None)
    if end is not None:
        say("until", f"{end}, less {duration(config.run.margin)}")
    say("", "everything that can be checked without running is in order" if not label else "everything is in order")


def _of_walker(say: Say, walker: str, name: str, text: str) -> None:
    say(name, f"[{walker}] {text}" if walker else text)


def _check_walkers(systems: Mapping[str, tuple[Frames, IpiInput | None]]) -> None:
    """Walkers share labels and weights, but no socket.  Raises: ConfigError for different atoms, or one address of two."""
    first, (frames, _) = next(iter(systems.items()))
    for name, (theirs, _) in systems.items():
        if not np.array_equal(theirs.numbers, frames.numbers):
            raise ConfigError(
                f"walkers {first!r} and {name!r} have different atoms, or in another order; give them runs of their own"
            )
    check_one_each({name: found.endpoints for name, (_, found) in systems.items() if found})


def _say_system(config: Config, frames: Frames, say: Say) -> None:
    a = config.accuracy
    promise = [f"{_energy(a.energy)} of the total energy"]
    if a.forces is not None:
        promise.append(f"{_force(a.forces)} on any atom")
    promise += [f"{_force(limit)} on {symbol}" for symbol, limit in a.species.items()]
    promise += [f"{_force(group.forces)} on group {name}" for name, group in a.groups.items()]
    say("accuracy", f"{', '.join(promise)}, with {100 * a.confidence:g} % confidence")
    say(
        "atoms",
        f"{len(frames.numbers)}, {'periodic' if frames.periodic else 'molecule'}, charge {frames.charge:+d}, "
        f"multiplicity {frames.multiplicity}",
    )


def _energy(value: float) -> str:
    return f"{value:.4g} eV = {value / KCAL_PER_MOL:.4g} kcal/mol"


def _force(value: float) -> str:
    return f"{value:.4g} eV/Å = {value / KCAL_PER_MOL:.4g} kcal/mol/Å"


def _say_ipi(config: Config, found: IpiInput | None, say: Say) -> None:
    if found is None:
        say("i-PI", "started by somebody else: give its socket to `serve`")
        return
    where = ", ".join(str(e) for e in found.endpoints)
    systems = f"{found.n_systems} systems, " if found.n_systems > 1 else ""
    checkpoints = f", checkpoint every {found.checkpoint_stride}" if found.checkpoint_stride else ""
    say("i-PI", f"{where}; {systems}{found.n_beads} beads, {found.total_steps} steps{checkpoints}")
    for text in [*input_findings(found, config), *filter(None, [batch_hint(found)])]:
        say("note", text)
    say("socket", socket_line(found.endpoints))


def _say_model(config: Config, model: Model, ensemble: Ensemble, frames: Frames, say: Say) -> None:
    sampled = sum(x.numel() for x in model.foundation_weights().values())
    say("potential", f"{config.potential.model}: {model.potential.path}")
    say("sampled", f"{sampled} weights per member, {config.ensemble.members} members")
    say("recipe", f"{config.ensemble.recipe}; distance to the labels {_distance(config, model)}")
    for reason in model.potential.never_sampled:
        say("fixed", reason)
    prediction = ensemble.predict(frames)
    line, places = model_line(frames, config.run.seed)
    deviation = model_deviation(line, ensemble.predict(places))
    largest = float(np.linalg.norm(prediction.mean_forces[0], axis=1).max())
    say(
        "prediction",
        f"energy {prediction.mean_energy[0]:.4f} eV, largest force {largest:.3g} eV/Å at the start; "
        f"forces and energies agree within {deviation:.1g} eV/Å",
    )
    if not deviation <= MODEL_TOLERANCE:
        raise ModelError(
            f"[potential] {config.potential.model}: along a line its energy and its forces differ by {deviation:.3g} eV/Å, expected "
            f'at most {MODEL_TOLERANCE} eV/Å; is the start structure sensible? If so, try dtype = "float64" or path = "modules"'
        )


def _distance(config: Config, model: Model) -> str:
    """Whether the variance of energies grows with it."""
    if make_distances(model.potential, model.noise, config.ensemble) is None:
        return "off" if config.ensemble.distance == "off" else "not to be had with this potential"
    return "in the variance of energies"


def _say_oracle(config: Config, oracle: Oracle, say: Say) -> None:
    o, able = config.oracle, oracle.capabilities
    stress = "with stress" if able.stress else "without stress"
    say("oracle", f"{oracle.code}, {stress} for crystals, fingerprint {fingerprint(oracle)[:12]}")
    budget = "any number of labels" if o.max_labels is None else f"at most {o.max_labels} labels"
    where = f"this machine, {o.workers} workers of {o.threads} threads" if config.executor.kind == "local" else _on_parsl(config)
    say("executor", f"{where}, {duration(o.timeout)} per label, {budget}")
    if config.trainer.executor == "parsl":
        say("trainer", _trainer_on_parsl(config.trainer))


def _on_parsl(config: Config) -> str:
    e = config.executor
    if e.slurm is not None:
        return f"Parsl on Slurm, at most {e.slurm.max_blocks} jobs of {e.slurm.nodes_per_block} nodes and {duration(e.slurm.walltime)}"
    return f"Parsl as {e.config} has it" if e.config else f"Parsl on this machine, {config.oracle.workers} workers"


def _trainer_on_parsl(t: TrainerSettings) -> str:
    if t.slurm is not None:
        gpus = f", {t.slurm.gpus_per_node} GPUs" if t.slurm.gpus_per_node else ""
        return f"Parsl on Slurm, one job at a time of {duration(t.slurm.walltime)}{gpus}, device {t.device}"
    where = (
        f"Parsl as {t.config} has it"
        if t.config
        else f"Parsl on this machine, accelerators {', '.join(t.accelerators) or 'not pinned'}"
    )
    return f"{where}, device {t.device}"


def _seconds_per_step(ensemble: Ensemble, frames: Frames, found: IpiInput | None) -> float:
    """Evaluation of all beads of a step, in the portions in which i-PI sends them; slightly displaced, as they come in a run."""
    beads = found.n_beads * found.n_systems if found else 1
    portion = min(found.batch_size, beads) if found else 1
    draw = np.random.default_rng(0)
    cell = None if frames.cell is None else np.repeat(frames.cell, portion, axis=0)
    seconds = []
    for _ in range(WARM_UP + TIMED):
        moved = frames.positions + draw.normal(scale=0.01, size=(portion, *frames.positions.shape[1:]))
        begin = time.perf_counter()
        ensemble.predict(replace(frames, positions=moved, cell=cell))
        seconds.append(time.perf_counter() - begin)
    return -(-beads // portion) * median(seconds[WARM_UP:])


class _Enough(Exception):
    """Ends an update of the chains that was only timed."""


def _update_seconds(config: Config, model: Model, item: LabelledFrame) -> float:
    """What an update takes with this one label, from its first steps; an end before the schedule's is left out of account."""
    learner = make_learner(model.potential, model.noise, config.ensemble, config.run.seed)
    times: list[float] = []

    def stop(step: int, loss: Tensor) -> None:
        times.append(time.perf_counter())
        if len(times) > CHAIN_WARM_UP + CHAIN_TIMED:
            raise _Enough

    with contextlib.suppress(_Enough):
        update(learner, foundation_generation(model, config.ensemble.members), [item], 0, stop)
    timed = times[min(CHAIN_WARM_UP, len(times) - 2) :]
    return (timed[-1] - timed[0]) / (len(timed) - 1) * config.ensemble.steps_per_update


def _say_cost(
    config: Config,
    found: IpiInput | None,
    state: RunState,
    step: float,
    label: float | None,
    learn: float | None,
    say: Say,
) -> None:
    say("per step", f"{duration(step)} of evaluation, without i-PI's own")
    known = "not known: `check --label` measures one" if label is None else duration(label)
    say(
        "per label",
        f"{known}, and {'an update of the chains' if learn is None else f'about {duration(learn)} of updating the chains'}",
    )
    if found is None:
        return
    left = max(found.total_steps - state.step, 0)
    parts = [f"{left} steps alone {duration(left * step)}"]
    if label is not None and learn is not None:
        parts.append(f"each asked label {duration(label + learn)} more")
    if state.step_seconds is not None:
        parts.append(f"at the pace so far, with labels, {duration(left * state.step_seconds)}")
    say("time", "; ".join(parts) + f"; about {_audits(config, found)} audits besides, on workers that wait")


def _audits(config: Config, found: IpiInput) -> str:
    if config.audit.probability is None:
        return f"{config.audit.expected:g}"
    return f"{config.audit.probability * found.total_steps * found.n_beads * found.n_systems:.0f}"


def _say_plan(found: IpiInput | None, state: RunState, say: Say) -> None:
    say("run", " ".join(_plan(found, state)))


def _plan(found: IpiInput | None, state: RunState) -> Iterator[str]:
    done = f"{state.labels} labels and generation {state.generation or 0}"
    total = f" of {found.total_steps}" if found else ""
    if state.owner is not None:
        yield f"{state.path}: a driver works here, {state.owner}; `run` would be refused until it ends. So far"
        yield f"step {state.step}{total}, {done}"
    elif not state.begun:
        yield f"{state.path}: would begin"
        yield f"at step {state.step}{total} with a label of the first frame"
    elif state.finished and not state.audits_pending:
        yield f"{state.path}: finished, with {done}; raise <total_steps> to go on"
    elif state.finished:
        yield f"{state.path}: would wait for {state.audits_pending} audits, all steps are done, with {done}"
    else:
        yield f"{state.path}: would resume at step {state.step}{total} with {done}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    for limit, factor, unit in ((1e-1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 86400:.3g} d"
