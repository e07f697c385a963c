"""The command line: each verb parses and calls one loop."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bnn_driver.errors import BnnError, ConfigError
from bnn_driver.loops.signals import stop_on_signals
from bnn_driver.threads import THREADS

SUMMARY = """An i-PI driver that keeps a simulation with a machine-learned potential within a promised accuracy.

Exit codes: 0 done, 2 usage or config, 3 environment, 4 oracle failed, 5 sampling diverged, 6 i-PI gone, 7 a guard stopped the run,
75 stopped on request or before the end of the job (the same command goes on)."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=SUMMARY)
ConfigFile = Annotated[Path, typer.Argument(help="the run's TOML file")]
Until = Annotated[
    str | None,
    typer.Option(
        "--until", help='stop in time for "23:30", "2026-03-01 06:00" or "2 h" from now, exit 75; default: the end of the job'
    ),
]
RunFolder = Annotated[Path, typer.Argument(help="run directory, or the TOML file of the run")]


Walker = Annotated[str, typer.Option("--walker", help="only this one of [ipi.walkers]")]


@app.command()
def run(config: ConfigFile, walker: Walker = "", until: Until = None) -> None:
    """Start i-PI on the input, drive it within the promised accuracy; the same command resumes."""
    with stop_on_signals():
        from bnn_driver.config import read_config
        from bnn_driver.report.numbers import render_summary, summary

        if read_config(config).ipi.walkers and not walker:
            from bnn_driver.loops.walkers import run_walkers

            folder = run_walkers(config, ["--until", until] if until else [])
        else:
            from bnn_driver.loops.session import run_session

            folder = run_session(config, walker, until)
        typer.echo(render_summary(summary(folder)))


@app.command()
def serve(
    config: ConfigFile,
    unix: Annotated[bool, typer.Option("-u", "--unix", help="Unix socket instead of TCP")] = False,
    address: Annotated[
        list[str] | None, typer.Option("-a", "--address", help="name or host, as in the XML; may be repeated")
    ] = None,
    port: Annotated[int, typer.Option("-p", "--port", help="TCP port")] = 65535,
    prefix: Annotated[str, typer.Option("-S", "--sockets-prefix", help="as in the XML")] = "/tmp/ipi_",
    shm: Annotated[bool, typer.Option("--shm", help="shared memory (ffsocket mode='shm')")] = False,
    walker: Walker = "",
    until: Until = None,
) -> None:
    """Drive an i-PI that you started yourself: nothing in its XML but the socket."""
    with stop_on_signals():
        from bnn_driver.loops.session import serve_session
        from bnn_driver.report.numbers import render_summary, summary

        folder = serve_session(
            config,
            unix=unix or shm,
            addresses=address or ["localhost"],
            port=port,
            prefix=prefix,
            shared_memory=shm,
            walker=walker,
            until=until,
        )
        typer.echo(render_summary(summary(folder)))


@app.command()
def select(config: ConfigFile) -> None:
    """Choose the frames of a labelled pool that teach most; the same command resumes."""
    with stop_on_signals():
        from bnn_driver.loops.pool import select as select_frames
        from bnn_driver.report.selection import render_selection, selection_figure, selection_summary

        folder = select_frames(config)
        selection_figure(folder, folder / "selection.png")
        typer.echo(
            f"{render_selection(selection_summary(folder))}\n\nlabels in {folder / 'labels'}, picture in {folder / 'selection.png'}"
        )


@app.command()
def explore(config: ConfigFile, until: Until = None) -> None:
    """Run dynamics of a new system, label and learn the frames that teach most, until nothing new comes; the same command resumes."""
    with stop_on_signals():
        from bnn_driver.loops.explore import explore as explore_system
        from bnn_driver.report.exploration import exploration_figure, exploration_summary, render_exploration

        folder = explore_system(config, until)
        exploration_figure(folder, folder / "exploration.png")
        typer.echo(
            f"{render_exploration(exploration_summary(folder))}\n\nlabels in {folder / 'labels'}, picture in {folder / 'exploration.png'}"
        )


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="run directory, or the TOML file of the run")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """What a run has asked, learnt and measured so far; reads only its files."""
    from bnn_driver.report.exploration import exploration_summary, is_exploration, render_exploration
    from bnn_driver.report.numbers import render_summary, summary
    from bnn_driver.report.selection import is_selection, render_selection, selection_summary

    folder = _run_folder(run)
    if is_exploration(folder):
        facts, text = exploration_summary(folder), render_exploration
    elif is_selection(folder):
        facts, text = selection_summary(folder), render_selection
    else:
        facts, text = summary(folder), render_summary
    typer.echo(json.dumps(facts, indent=2) if as_json else text(facts))


@app.command()
def report(run: RunFolder, output: Annotated[Path, typer.Option("-o", "--output", help="PNG file")] = Path("run.png")) -> None:
    """Draw the picture of a run."""
    from bnn_driver.report.exploration import exploration_figure, is_exploration
    from bnn_driver.report.figures import run_figure
    from bnn_driver.report.selection import is_selection, selection_figure

    folder = _run_folder(run)
    draw = exploration_figure if is_exploration(folder) else selection_figure if is_selection(folder) else run_figure
    draw(folder, output)
    typer.echo(f"wrote {output}")


@app.command()
def export(
    run: RunFolder,
    to: Annotated[str, typer.Option("--to", help="mace | committee | ase")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")] = Path("exported"),
) -> None:
    """Write the members as ordinary .model files, and the labels as one extxyz."""
    from bnn_driver.loops.export import export_run

    typer.echo(export_run(_run_folder(run), to, output))


@app.command()
def check(
    config: ConfigFile,
    label: Annotated[
        bool, typer.Option("--label", help="also have the oracle label the start structure, five to seven times")
    ] = False,
    walker: Walker = "",
) -> None:
    """Try config, i-PI input or pool, socket, model, oracle and run directory without running; says what `run` would do and cost."""
    from bnn_driver.config import read_toml

    def say(name: str, text: str) -> None:
        typer.echo(f"{name:<12}{text}" if name else text)

    tables = read_toml(config)
    if walker and tables.keys() & {"explore", "pool"}:
        raise ConfigError(
            f"--walker {walker} belongs to `run`; `check` looks at all walkers of an exploration at once; leave it out"
        )
    if "explore" in tables:
        from bnn_driver.loops.explore import check_exploration

        check_exploration(config, say, label=label)
    elif "pool" in tables:
        from bnn_driver.loops.pool import check_selection

        if label:
            raise ConfigError(
                "--label: the frames of a pool have their labels already, and `select` asks no oracle; leave it out"
            )
        check_selection(config, say)
    else:
        from bnn_driver.loops.checking import check_session

        check_session(config, say, label=label, walker=walker)


@app.command()
def doctor(folder: Annotated[Path, typer.Argument(help="where a run would live")] = Path()) -> None:
    """What this machine has of what a run needs: versions, GPU, kernels, oracles, codes, scheduler, file system."""
    from bnn_driver.loops.doctor import Finding, examine

    def say(finding: Finding) -> None:
        typer.echo(f"{finding.name:<16}{finding.text}")
        if finding.remedy:
            typer.echo(f"{'':<16}{'BROKEN' if finding.required else 'PROBLEM'}: {finding.remedy}")

    examine(folder, say)
    typer.echo("nothing that every run needs is missing")


def _run_folder(path: Path) -> Path:
    """The run directory behind a TOML file, a run directory, or a folder with a bnn.toml."""
    from bnn_driver.explore_config import read_any_config

    file = path / "bnn.toml" if path.is_dir() and not (path / "events").is_dir() else path
    folder = file.parent / read_any_config(file).run.directory if file.is_file() else path
    if not (folder / "events").is_dir():
        raise ConfigError(f"{path}: no run here (there is no folder {folder / 'events'}); start one with: bnn-driver run CONFIG")
    return folder


def _set_up_logging() -> None:
    level = os.environ.get("BNN_DRIVER_LOG_LEVEL", "WARNING").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger("bnn_driver").addHandler(handler)
    logging.getLogger("bnn_driver").setLevel(level)


def _limit_threads() -> None:
    """One thread per numerical library unless the user says otherwise, before any of them is imported.

    With their defaults an evaluation of 15 ms takes 1000 ms on a busy machine; [potential] threads sets torch's own.
    """
    for name in THREADS:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(arguments: Any = None) -> None:
    """Entry point: errors of ours end with their exit code and one message, without a traceback."""
    _set_up_logging()
    _limit_threads()
    try:
        app(args=arguments, standalone_mode=True)
    except BnnError as error:
        sys.stderr.write(f"bnn-driver: {error}\n")
        sys.exit(error.exit_code)
    finally:
        if arguments is None:  # this process ends: its exit code is decided, and takes a second to get out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    main()
