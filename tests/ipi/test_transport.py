"""Channels: exact, never endless, and an end that i-PI survives."""

import socket
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from bnn_driver.errors import ConfigError, EnvironmentProblem, IpiGone
from bnn_driver.ipi.transport import Channel, Endpoint, SharedArrays, accept, connect, has_listener, listen, remove_stale_socket


def pair() -> tuple[Channel, socket.socket]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(15.0)
    return Channel(ours, "i-PI"), theirs


@pytest.mark.parametrize("text", ["unix:bnn", "unix:/run/user/1/sock_a", "inet:node7.cluster:31415"])
def test_endpoint_survives_text(text: str):
    endpoint = Endpoint.parse(text)
    assert Endpoint.parse(str(endpoint)).path == endpoint.path
    assert (endpoint.kind, endpoint.port) == (text[:4], 31415 if text[:4] == "inet" else 0)


def test_bare_name_gets_the_prefix_of_ipi():
    assert Endpoint.parse("unix:bnn").path == "/tmp/ipi_bnn"


@pytest.mark.parametrize("text", ["", "bnn", "tcp:a:1", "inet:host", "inet:host:port", "unix:"])
def test_other_text_is_no_endpoint(text: str):
    with pytest.raises(ConfigError, match="endpoint"):
        Endpoint.parse(text)


def test_read_returns_exactly_what_is_asked_whatever_the_pieces():
    channel, peer = pair()
    data = bytes(range(256)) * 1000

    def dribble() -> None:
        for start in range(0, len(data), 7001):
            peer.sendall(data[start : start + 7001])

    sender = threading.Thread(target=dribble)
    sender.start()
    assert channel.read(1) + channel.read(12) + channel.read(200_000) + channel.read(55_987) == data
    sender.join()
    assert not channel.readable(0.0)
    channel.close()
    peer.close()


def test_end_of_file_raises_instead_of_spinning():
    channel, peer = pair()
    peer.sendall(b"abc")
    peer.close()
    with pytest.raises(IpiGone, match="closed"):
        channel.read(12)
    channel.close()


def test_write_to_a_peer_that_left_raises():
    channel, peer = pair()
    peer.close()
    with pytest.raises(IpiGone, match="broke"):
        channel.write(b"x" * 1_000_000)
    channel.close()


def test_deadline_passes():
    channel, peer = pair()
    with pytest.raises(TimeoutError):
        channel.read(1, time.monotonic() + 0.05)
    channel.close()
    peer.close()


def test_deadline_passes_inside_a_message_and_what_came_is_kept():
    channel, peer = pair()
    peer.sendall(b"STAT")
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.read(12, start + 0.05)
    assert time.monotonic() - start < 15.0
    peer.sendall(b"US      ")
    assert channel.read(12, time.monotonic() + 15.0) == b"STATUS      "
    channel.close()
    peer.close()


def test_deadline_passes_while_bytes_trickle_in():
    channel, peer = pair()
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.005):
            peer.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.read(10_000, start + 0.1)
    assert time.monotonic() - start < 15.0
    stop.set()
    thread.join(15.0)
    channel.close()
    peer.close()


@pytest.mark.parametrize("unread", [0, 100, 200_000])
def test_hanging_up_over_unread_bytes_is_an_end_of_file_and_no_reset(unread: int):
    channel, peer = pair()
    peer.settimeout(15.0)
    peer.setblocking(False)
    sent = peer.send(b"x" * unread) if unread else 0
    peer.settimeout(15.0)
    channel.close()
    assert (sent > 0) == (unread > 0)
    assert peer.recv(1) == b""  # ECONNRESET here is what hangs i-PI
    peer.close()


def test_hang_up_wakes_a_reader_in_another_thread():
    channel, peer = pair()
    caught: list[BaseException] = []

    def read() -> None:
        try:
            channel.read(12)
        except IpiGone as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)
    channel.hang_up()
    reader.join(15.0)
    assert len(caught) == 1
    channel.close()
    peer.close()


def test_connect_waits_until_somebody_listens(tmp_path: Path):
    endpoint = Endpoint("unix", "late", prefix=f"{tmp_path}/")
    servers = []
    timer = threading.Timer(0.2, lambda: servers.append(listen(endpoint)[0]))
    timer.start()
    channel = connect(endpoint, 5.0)
    timer.join()
    channel.close()
    servers[0].close()


def test_connect_says_where_and_how_long_it_waited(tmp_path: Path):
    with pytest.raises(IpiGone, match=r"no i-PI listens at unix:.*/nobody; waited 0\.1 s .*check <address>"):
        connect(Endpoint("unix", "nobody", prefix=f"{tmp_path}/"), 0.1)


def test_names_that_can_never_work_are_config_errors(tmp_path: Path):
    with pytest.raises(ConfigError, match="107"):
        connect(Endpoint("unix", "x" * 120, prefix=f"{tmp_path}/"), 0.1)


def test_inet_connects_with_small_messages_at_once():
    server, endpoint = listen(Endpoint("inet", "localhost", 0))
    ours = connect(endpoint, 2.0)
    theirs = accept(server, 2.0, "the code")
    assert theirs is not None
    ours.write(b"hello")
    assert theirs.read(5) == b"hello"
    assert ours._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for thing in (ours, theirs, server):
        thing.close()


def test_stale_socket_file_is_removed_and_a_live_one_is_respected(tmp_path: Path):
    endpoint = Endpoint("unix", "s", prefix=f"{tmp_path}/")
    server, _ = listen(endpoint)
    assert has_listener(endpoint.path)
    with pytest.raises(EnvironmentProblem, match="already listens"):
        remove_stale_socket(endpoint.path)
    server.close()
    assert not has_listener(endpoint.path)
    assert remove_stale_socket(endpoint.path)
    assert not Path(endpoint.path).exists()
    assert not remove_stale_socket(endpoint.path)


def test_listening_twice_says_so(tmp_path: Path):
    endpoint = Endpoint("unix", "s", prefix=f"{tmp_path}/")
    server, _ = listen(endpoint)
    with pytest.raises(EnvironmentProblem, match="cannot listen"):
        listen(endpoint)
    server.close()


ATTACH = """
import sys
from bnn_driver.ipi.transport import SharedArrays
shared = SharedArrays({kind: sys.argv[1] for kind in ("pos", "h", "ih", "pot", "force", "vir")}, 1, 1)
shared.arrays["pot"][0, 0] = 7.0
"""


def test_shared_memory_of_ipi_outlives_the_driver():
    segment = shared_memory.SharedMemory(create=True, size=4096)
    try:
        done = subprocess.run([sys.executable, "-c", ATTACH, segment.name], capture_output=True, text=True, check=True)
        again = shared_memory.SharedMemory(name=segment.name)  # FileNotFoundError: the driver's exit removed it
        assert bytes(again.buf[:8]) == b"\0\0\0\0\0\0\x1c@"
        again.close()
        assert "leaked" not in done.stderr
    finally:
        segment.close()
        segment.unlink()


def test_shared_memory_that_is_not_there_says_one_node():
    with pytest.raises(EnvironmentProblem, match="one node"):
        SharedArrays({"pos": "no_such_segment"}, 1, 1)
