"""What codes that are run once per label have in common: the program, a fresh folder, the process, and the ladder.

Folders are made in the current directory, which for a worker of an executor is its own.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from bnn_driver.errors import EnvironmentProblem, OracleConfigError, OracleError, SCFNotConverged
from bnn_driver.records import Frames, Label
from oracles.guarded import Guarded
from oracles.restart import Restart
from oracles.scrutiny import ERRORS

MPI_PREFIX = "PARSL_MPI_PREFIX"
"""The variable in which a worker of Parsl finds how to start a program on the nodes of this label."""
Result = TypeVar("Result")
Keep = Literal["none", "failed", "all"]
"""Which work folders stay: of failed labels (default), of all, or none."""


def words_of(kind: str, command: str | list[str], key: str = "command") -> list[str]:
    """A command as words, without a shell.  Args: key: the setting, for messages.   Raises: OracleConfigError if there are none."""
    try:
        words = shlex.split(command) if isinstance(command, str) else list(command)
    except ValueError as error:
        raise OracleConfigError(f"[oracle.{kind}] {key} = {command!r} cannot be split into words: {error}") from error
    if not words:
        raise OracleConfigError(f'[oracle.{kind}] {key} is empty; give what runs the code, for example "mpirun -n 16 {kind}"')
    return words


def program(kind: str, command: str | list[str], key: str = "command", folder: Path | None = None) -> list[str]:
    """The words of a command, whose first one must be found.

    A first word $PARSL_MPI_PREFIX stands for all words of that variable; it stays as it is where nobody has set it.
    Args: key: the setting, for messages.   folder: a copy of it is where the command runs; a program in it is found first.
    Raises: OracleConfigError if it is empty or relative to another folder; EnvironmentProblem if there is no such program.
    """
    words = words_of(kind, command, key)
    if words[0] == f"${MPI_PREFIX}":
        if not words[1:]:
            raise OracleConfigError(f"[oracle.{kind}] {key} has no program after {words[0]}")
        prefix = shlex.split(os.environ[MPI_PREFIX]) if MPI_PREFIX in os.environ else words[:1]
        return prefix + program(kind, words[1:], key, folder)
    name, *rest = words
    if folder is not None and not Path(name).is_absolute() and (folder / name).is_file():
        return [f"./{name}", *rest]
    if "/" in name and not Path(name).is_absolute():
        raise OracleConfigError(
            f"[oracle.{kind}] {key} starts with {name!r}, relative to a folder, but the code runs in a folder of its own; "
            "give an absolute path, or a name on the PATH"
        )
    if shutil.which(name) is None:
        raise EnvironmentProblem(
            f"[oracle.{kind}] {key} starts with {name!r}, which is no program here{f' and no file of {folder}' if folder else ''}; "
            "load its module, or give the absolute path of an executable file"
        )
    return [name, *rest]


@contextlib.contextmanager
def work_folder(name: str, keep: Keep) -> Iterator[Path]:
    """A new folder NAME, or NAME.2 and so on; removed at the end as `keep` says."""
    folder, number = Path.cwd() / name, 1
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
        number += 1
        folder = Path.cwd() / f"{name}.{number}"
    try:
        yield folder
    except BaseException:
        if keep == "none":
            shutil.rmtree(folder)
        raise
    if keep != "all":
        shutil.rmtree(folder)


def run(kind: str, words: list[str], folder: Path, output: str) -> str:
    """Run a command in a folder until it ends; if this process dies before, the command and all it started are ended.

    Args: output: name of the file that gets its standard output; standard error goes to stderr.txt.
    Returns: how it ended, such as "exit status 0".   Raises: EnvironmentProblem if it cannot be started, OracleCrashed if its guard died.
    """
    if words[0] == f"${MPI_PREFIX}":
        raise OracleConfigError(
            f"[oracle.{kind}] command starts with {words[0]}, which only [executor.mpi] gives a meaning; add that table or remove it"
        )
    process = Guarded(kind, words, folder, output, ERRORS)
    try:
        process.wait()
    finally:
        process.stop()
    return process.end


def climb(ladder: list[dict[str, Any]], attempt: Callable[[int, dict[str, Any]], Label]) -> Label:
    """The first label of rung 0, without changes, and of the rungs of a ladder.  Raises: SCFNotConverged after the last one."""
    failures = []
    for rung, changes in enumerate([{}, *ladder]):
        try:
            return attempt(rung, changes)
        except SCFNotConverged as error:
            failures.append(f"rung {rung}: {error}")
    raise SCFNotConverged("\n".join(failures))


@dataclass(frozen=True)
class Shot:
    """How a code is run for one frame."""

    kind: str
    command: str | list[str]
    output: str
    """Name of the file that gets its standard output."""
    keep: Keep
    restart_files: tuple[str, ...]
    """Patterns of what one label leaves for the next one; empty: each label starts cold."""

    def fire(
        self,
        frame: Frames,
        fingerprint: str,
        rung: int,
        write: Callable[[Path, str], None],
        read: Callable[[Path, str], Result],
    ) -> tuple[Result, list[str]]:
        """Run the code in a new folder, named after the frame.

        Args: write: puts the input into a folder, given also the id of the label whose density will lie there, or "".
            read: the checked result of a folder, given also how the run ended.
        Returns: the result, and what its evidence should say of the run.
        """
        frame_id = frame.content_id(fingerprint)
        restart = Restart(self.kind, fingerprint, frame, self.restart_files)
        origin = restart.origin if self.restart_files and rung == 0 else ""
        name = f"{self.kind}-{frame_id[:12]}" + (f"-rung{rung}" if rung else "")
        with work_folder(name, self.keep) as folder:
            write(folder, origin)
            if origin:
                restart.lend(folder)
            ended = run(self.kind, program(self.kind, self.command), folder, self.output)
            try:
                result = read(folder, ended)
            except OracleError:
                restart.forget()
                raise
            if self.restart_files:
                restart.take(folder, frame_id)
        facts = [f"started from the density of label {origin}"] if origin else []
        return result, facts + ([ended] if ended != "exit status 0" else [])
