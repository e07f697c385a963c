"""An i-PI client that misbehaves on request: springs between all atoms, and one word per frame says what goes wrong.

Usage: spring.py ENDPOINT BEHAVIOUR[,BEHAVIOUR...]; the last one stays.
"""

import os
import subprocess
import sys
import threading
import time

import numpy as np

from bnn_driver.ipi.client import Client, Reply
from bnn_driver.ipi.transport import Endpoint

behaviours = sys.argv[2].split(",")
log = open("log", "a", buffering=1)  # noqa: SIM115
log.write("Spring 1.0\nspring constants were read: converged\n")  # before the first frame


def say(text):
    log.write(text + "\n")


def springs(x, push=0.0):
    d = x[None] - x[:, None]
    r = np.linalg.norm(d, axis=-1) + np.eye(len(x))
    f = ((r - 1.0) * (1 - np.eye(len(x))) / r)[..., None] * d
    return 0.25 * ((r - 1.0) ** 2 * (1 - np.eye(len(x)))).sum(), f.sum(axis=1) + push


def handler(request):
    word = behaviours.pop(0) if len(behaviours) > 1 else behaviours[0]
    energy, forces = springs(request.positions[0], 0.01 if word == "push" else 0.0)
    np.savetxt("positions", request.positions[0])
    np.savetxt("cell", request.cell[0])
    if word in ("ok", "double", "push", "leave", "straggler", "zombie"):
        say("SCF converged in 7 steps")
    if word == "double":
        say("SCF converged in 8 steps")
    if word in ("failed", "failcrash"):
        say("SCF NOT CONVERGED")
    if word == "late":
        threading.Timer(0.5, say, ["SCF converged in 9 steps"]).start()
    if word == "straggler":  # a second line, after the reply
        threading.Timer(0.2, say, ["SCF converged in 8 steps"]).start()
    if word in ("crash", "failcrash"):
        print("segmentation fault, more or less", file=sys.stderr, flush=True)
        os._exit(3)
    if word == "hang":
        time.sleep(1000)
    if word == "cut":
        os.truncate("log", 0)
    if word == "zombie":  # a child in a session of its own, that takes no notice of SIGTERM
        script = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'.'); time.sleep(1000)"
        child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE)
        child.stdout.read(1)
        with open("child", "w") as file:
            file.write(str(child.pid))
    if word == "leave":
        threading.Timer(0.2, os._exit, [0]).start()
    virial = np.einsum("ai,aj->ij", forces, request.positions[0])
    return Reply(np.array([energy]), forces[None], virial[None], ["{}"])


if sys.argv[2] == "absent":
    time.sleep(1000)
Client(
    [Endpoint.parse(sys.argv[1])], handler, shared_memory=False, connect_timeout=10.0, reconnects=0, gather_seconds=0.0
).serve()
