"""A real Parsl on this machine: whatever is killed, every frame gets its label once or an error, and nothing is left behind."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from third_party import ACCELERATOR, FORKS, SLEEPS, SLOW, UNCONVERGED, calls, helium, install

pytest.importorskip("parsl")
import zmq
from deployments import HEARTBEAT, LIMITS, alive, deploy, ended, eventually, family, oracles, pools
from zmq.utils.monitor import recv_monitor_message

from bnn_driver.errors import ConfigError, EnvironmentProblem, OracleCrashed, OracleTimeout, SCFNotConverged
from bnn_driver.executor_config import Mpi
from bnn_driver.executors import LocalExecutor, remote
from bnn_driver.executors.parsl import from_file, on_this_machine
from bnn_driver.executors.remote import RemoteExecutor
from bnn_driver.oracle import read_done, read_failures
from bnn_driver.records import Frames

pytestmark = [
    pytest.mark.slow,
    # Parsl leaves sockets open where it looks for the addresses of this machine
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RemoteExecutor]]:
    """Starts deployments of the oracle `faulty` or of others; at the end nothing of them may live."""
    install(tmp_path / "site", monkeypatch)
    started: list[RemoteExecutor] = []

    def begin(kind: str = "faulty", **options: object) -> RemoteExecutor:
        started.append(deploy(tmp_path, kind, **options))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for executor in started:
        executor.shutdown(wait=False)
    assert eventually(lambda: not family(tmp_path, os.getpid()), 3 * HEARTBEAT), family(tmp_path, os.getpid())


def labels_of_here(tmp_path: Path, kind: str, frames: list[Frames]) -> list[tuple[float, bytes]]:
    with LocalExecutor(kind, {}, 2, 20.0, tmp_path / "here", 1, tmp_path / "here", limits=LIMITS) as executor:
        return [(f.result().energy, f.result().forces.tobytes()) for f in [executor.submit(x) for x in frames]]


@pytest.mark.parametrize("kind", ["toy", "tblite"])
def test_labels_are_those_of_this_machine_to_the_last_bit(
    start: Callable[..., RemoteExecutor], tmp_path: Path, kind: str
) -> None:
    if kind == "tblite":
        pytest.importorskip("tblite")
    rng = np.random.default_rng(1)
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    frames = [Frames(np.array([8, 1, 1]), (water + rng.normal(0, 0.05, (3, 3)))[None]) for _ in range(8)]
    executor = start(kind, workers=2)
    futures = [executor.submit(frame) for frame in frames]
    assert executor.submit(frames[-1]) is futures[-1] or futures[-1].done()
    got = [(future.result().energy, future.result().forces.tobytes()) for future in futures]
    assert got == labels_of_here(tmp_path, kind, frames)
    assert len(oracles(tmp_path)) <= 2  # they live on from label to label
    executor.shutdown()


def test_each_worker_sees_an_accelerator_of_its_own(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start(layout=on_this_machine(2, tmp_path / "parsl", HEARTBEAT, accelerators=2))
    futures = [executor.submit(helium(ACCELERATOR, x=float(n))) for n in range(6)]
    assert {future.result(timeout=180).evidence for future in futures} == {"0", "1"}


def test_a_worker_killed_in_the_middle_is_replaced(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start()
    future = executor.submit(helium(SLOW))
    assert eventually(lambda: len(oracles(tmp_path)) == 1 and (tmp_path / "work" / "calls").exists())
    (oracle,) = oracles(tmp_path)
    worker = oracle.parent()
    assert worker is not None
    worker.kill()
    assert eventually(lambda: not alive(oracle), 30)  # what is not waited for is not computed
    assert future.result(timeout=180).energy == -8.0
    assert calls(tmp_path / "work") == 2
    assert read_failures(tmp_path / "spool") == {}


def test_the_loss_of_the_only_job_is_survived(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start()
    executor.submit(helium()).result(timeout=180)
    (pool,) = pools(tmp_path)
    future = executor.submit(helium(SLOW))
    assert eventually(lambda: calls(tmp_path / "work") == 2)
    for process in [pool, *pool.children(recursive=True)]:
        process.kill()
    assert future.result(timeout=180).energy == -8.0
    assert calls(tmp_path / "work") == 3
    assert pools(tmp_path) != [pool]


def test_a_worker_that_outlives_its_pool_is_waited_for(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start()
    executor.submit(helium()).result(timeout=180)
    (pool,) = pools(tmp_path)
    future = executor.submit(helium(SLOW))
    assert eventually(lambda: calls(tmp_path / "work") == 2)
    started = pool.children(recursive=True)
    pool.kill()
    assert future.result(timeout=180).energy == -8.0
    assert calls(tmp_path / "work") == 2  # its label was there before that of a second worker
    assert eventually(lambda: not [p for p in started if alive(p)], 30), [p.cmdline() for p in started if alive(p)]


def test_the_death_of_the_interchange_ends_the_run_with_its_name(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start()
    future = executor.submit(helium(SLEEPS))
    assert eventually(lambda: (tmp_path / "work" / "calls").exists())
    (interchange,) = [p for p in psutil.Process().children() if "interchange" in " ".join(p.cmdline())]
    interchange.kill()
    with pytest.raises(EnvironmentProblem, match=r"interchange has ended with status -9.*same command again"):
        future.result(timeout=60)
    with pytest.raises(EnvironmentProblem):
        executor.submit(helium()).result(timeout=60)
    begin = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - begin < 60
    assert eventually(lambda: not oracles(tmp_path), 30)


def test_a_hanging_code_is_killed_at_its_limit_and_its_worker_goes_on(
    start: Callable[..., RemoteExecutor], tmp_path: Path
) -> None:
    executor = start(timeout=2.0)
    executor.submit(helium()).result(timeout=180)
    (pool,) = pools(tmp_path)
    begin = time.monotonic()
    with pytest.raises(OracleTimeout, match="killed after 2 s"):
        executor.submit(helium(SLEEPS)).result(timeout=60)
    assert 1.9 < time.monotonic() - begin < 40
    with pytest.raises(SCFNotConverged, match="no rung of the ladder"):
        executor.submit(helium(UNCONVERGED)).result(timeout=60)
    with pytest.raises(OracleTimeout):
        executor.submit(helium(FORKS)).result(timeout=60)
    (file,) = (tmp_path / "work").glob("*/grandchild")
    assert eventually(lambda: ended(int(file.read_text())), 30)
    assert executor.submit(helium(x=1.0)).result(timeout=60).energy == 0.0
    assert pools(tmp_path) == [pool]
    assert {f["class"] for f in read_failures(tmp_path / "spool").values()} == {"OracleTimeout", "SCFNotConverged"}


def test_shutdown_without_waiting_ends_everything(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    executor = start()
    running, waiting = executor.submit(helium(FORKS)), executor.submit(helium())
    assert eventually(lambda: list((tmp_path / "work").glob("*/grandchild")))
    (file,) = (tmp_path / "work").glob("*/grandchild")
    members = family(tmp_path, os.getpid())
    assert len(members) > 4
    begin = time.monotonic()
    executor.shutdown(wait=False)
    assert time.monotonic() - begin < 40
    assert waiting.cancelled()
    assert isinstance(running.exception(), OracleCrashed)
    assert eventually(lambda: not any(alive(p) for p in members), 30), [p for p in members if alive(p)]
    assert eventually(lambda: ended(int(file.read_text())), 30)
    assert read_failures(tmp_path / "spool") == {}


DRIVER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from deployments import deploy
from third_party import SLOW, helium
executor = deploy(Path(sys.argv[1]), "faulty", heartbeat=8.0)
executor.submit(helium()).result()
executor.submit(helium(SLOW)).result()
"""


def test_a_killed_driver_leaves_its_labels_and_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "site", monkeypatch)
    here = Path(__file__).resolve().parent
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(here), str(here.parent)])
    try:
        assert eventually(lambda: (tmp_path / "work" / "calls").exists() and calls(tmp_path / "work") == 2, 60)
        members = family(tmp_path, driver.pid)
        driver.kill()
        driver.wait()
        # the next driver, started before the workers know: it waits for the label that is being computed
        with LocalExecutor("faulty", {}, 1, 20.0, tmp_path / "work", 1, tmp_path / "spool", limits=LIMITS) as executor:
            assert executor.submit(helium(SLOW)).result(timeout=60).energy == -8.0
            assert read_done(tmp_path / "spool", helium().content_id(executor.fingerprint)) is not None
        assert calls(tmp_path / "work") == 2
        assert eventually(lambda: not any(alive(p) for p in members), 40), [p for p in members if alive(p)]
    finally:
        driver.kill()
        for process in family(tmp_path):
            process.kill()


USERS = """
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider
config = Config(executors=[HighThroughputExecutor(
    label="mine", address="127.0.0.1", max_workers_per_node=2, cores_per_worker=0.1, heartbeat_period=1, heartbeat_threshold=4,
    encrypted=False, launch_cmd={command!r}, provider=LocalProvider(worker_init={init!r}, max_blocks=1),
)], strategy_period=1)
"""


def users_file(tmp_path: Path, init: str = "") -> Path:
    from bnn_driver.executors.parsl import _pool_command

    path = tmp_path / "parsl_config.py"
    path.write_text(USERS.format(init=init, command=_pool_command()))
    return path


def test_a_file_of_the_users_own(start: Callable[..., RemoteExecutor], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bnn_driver")
    layout = from_file(users_file(tmp_path), None, 20.0, tmp_path / "parsl")
    assert layout.places == 2
    assert "block_error_handler" in caplog.text
    executor = start(layout=layout)
    assert [f.result(timeout=180).energy for f in [executor.submit(helium(x=x)) for x in (0.0, 1.0, 2.0)]] == [0.0] * 3
    assert "encrypted is not true" in caplog.text
    for port in (layout.executor.worker_port, layout.executor.outgoing_q.port, layout.executor.incoming_q.port):  # type: ignore[union-attr]
        assert not lets_in_strangers(port)


def lets_in_strangers(port: int) -> bool:
    """Whether a client without keys gets through to a socket of Parsl."""
    failures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.linger = 0
        with client.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | failures | zmq.EVENT_DISCONNECTED) as monitor:
            client.connect(f"tcp://127.0.0.1:{port}")
            assert monitor.poll(20_000), "neither let in nor refused"
            through = bool(recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
            client.disable_monitor()
    return through


def test_sockets_without_keys_would_be_seen() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        assert lets_in_strangers(server.bind_to_random_port("tcp://127.0.0.1"))


def test_an_mpi_executor_of_the_users_own_is_encrypted_too(tmp_path: Path) -> None:
    path = tmp_path / "parsl_config.py"
    path.write_text(
        "from parsl.config import Config\nfrom parsl.executors import MPIExecutor\n"
        "from parsl.launchers import SimpleLauncher\nfrom parsl.providers import LocalProvider\n"
        "config = Config(executors=[MPIExecutor(provider=LocalProvider(launcher=SimpleLauncher()))])\n"
    )
    assert from_file(path, Mpi(ranks_per_node=1), 20.0, tmp_path).executor.encrypted


def test_jobs_that_fail_one_after_the_other_end_the_run(start: Callable[..., RemoteExecutor], tmp_path: Path) -> None:
    layout = from_file(users_file(tmp_path, "echo no such module >&2; exit 7"), None, 20.0, tmp_path / "parsl")
    with pytest.raises(
        EnvironmentProblem, match=r"(?s)3 jobs failed one after the other.*EXIT CODE: 7.*no such module.*same command again"
    ):
        start(layout=layout).submit(helium()).result(timeout=180)


@pytest.mark.parametrize("queue", [True, False])
def test_a_label_that_no_worker_takes_ends_the_run_with_what_to_look_at(
    start: Callable[..., RemoteExecutor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: bool
) -> None:
    monkeypatch.setattr(remote, "START_LIMIT", 3.0)
    layout = on_this_machine(1, tmp_path / "parsl", HEARTBEAT)
    layout.executor.provider.worker_init = "sleep 300"  # type: ignore[union-attr]
    executor = start(layout=replace(layout, queue_timeout=4.32) if queue else layout)
    said = (
        r"within 5e-05 days \(queue_timeout\).*squeue.*same command again"
        if queue
        else "no worker on this machine .* within 3 s; see"
    )
    with pytest.raises(EnvironmentProblem, match=said):
        executor.submit(helium()).result(timeout=60)


def test_a_label_that_takes_longer_than_a_worker_may_be_waited_for_is_no_such(
    start: Callable[..., RemoteExecutor], tmp_path: Path
) -> None:
    layout = replace(on_this_machine(1, tmp_path / "parsl", HEARTBEAT), queue_timeout=30.0)
    executor = start(layout=layout)
    executor.submit(helium(x=1.0)).result(timeout=180)
    object.__setattr__(layout, "queue_timeout", 2.0)
    assert executor.submit(helium(SLOW)).result(timeout=60).energy == -8.0


def test_no_more_jobs_than_allowed_are_submitted(
    start: Callable[..., RemoteExecutor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = start(jobs_per_hour=1)
    executor.submit(helium()).result(timeout=180)
    for pool in pools(tmp_path):
        for process in [pool, *pool.children(recursive=True)]:
            process.kill()
    future = executor.submit(helium(x=1.0))
    assert eventually(lambda: "jobs_per_hour" in caplog.text, 30)
    assert "the next one in 3" in caplog.text
    assert not pools(tmp_path)
    assert not future.done()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config = 3", "a parsl.config.Config, got 3"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("from parsl.config import Config\nconfig = Config()", "expected one HighThroughputExecutor or MPIExecutor"),
        (
            "from parsl.config import Config\nfrom parsl.executors import HighThroughputExecutor\n"
            "config = Config(executors=[HighThroughputExecutor()])",
            "max_workers_per_node",
        ),
    ],
)
def test_a_file_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "parsl_config.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        from_file(path, None, 20.0, tmp_path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
