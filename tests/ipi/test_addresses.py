"""What lies at an address is told without disturbing who listens there."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import pytest

from bnn_driver.errors import ConfigError, EnvironmentProblem
from bnn_driver.ipi.addresses import state_of
from bnn_driver.ipi.server import unique_endpoint
from bnn_driver.ipi.transport import Endpoint, listen


def unix(folder: Path, name: str = "s") -> Endpoint:
    return Endpoint("unix", name, prefix=f"{folder}/")


def test_a_free_name_is_left_free(tmp_path: Path) -> None:
    assert state_of(unix(tmp_path)) == "free"
    assert not list(tmp_path.iterdir())


def test_a_listener_is_seen_and_left_alone(tmp_path: Path) -> None:
    server, endpoint = listen(unix(tmp_path))
    with server:
        assert state_of(endpoint) == "listening"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert state_of(endpoint) == "stale"
    assert Path(endpoint.path).exists(), "only told"


def test_another_file_of_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(EnvironmentProblem, match="no socket"):
        state_of(unix(tmp_path))
    assert (tmp_path / "s").read_text() == "mine"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot listen"):
        state_of(unix(tmp_path / "absent"))


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107"):
        state_of(unix(tmp_path, "x" * 120))


def test_ports_are_free_or_taken() -> None:
    server, endpoint = listen(Endpoint("inet", "localhost", 0))
    with server:
        assert state_of(endpoint) == "listening"
    assert state_of(endpoint) == "free"


def test_an_address_of_another_machine_is_told_apart() -> None:
    assert state_of(Endpoint("inet", "192.0.2.1", 31415)) == "elsewhere"  # RFC 5737: never anybody's


def test_servers_of_ours_are_reached_from_this_machine_alone() -> None:
    """A code that this program serves connects through a Unix socket of its own, or through loopback."""
    server, endpoint = listen(unique_endpoint(f"/tmp/bnn-test-{uuid.uuid4().hex[:8]}-"))
    with server:
        assert server.family == socket.AF_UNIX
    Path(endpoint.path).unlink()
    for host in ("localhost", "127.0.0.1"):
        server, _ = listen(Endpoint("inet", host, 0))
        with server:
            assert server.getsockname()[0].startswith("127.")
