"""A Ray of several nodes on this machine, and a cluster deployed on it, as on a real one.

`python -m loadtests.ray_nodes cluster.json 4 1` starts a head with four processors and a node with
one by ``ray start``, deploys the file that `hira cluster config` wrote, and ends all of it at
SIGTERM. Every node has the switches of docs/cluster.md from the environment.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading

RAY = (sys.executable, "-m", "ray.scripts.scripts")
SERVE = (sys.executable, "-m", "ray.serve.scripts")
OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes
END_S = 60.0


def main(config: str, head_cpus: str, *cpus: str) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    common = ("--block", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}")
    ended = threading.Event()
    # Ray writes down where the head is, for whoever starts a Ray program on this machine.
    places = tempfile.TemporaryDirectory(prefix="nodes-")
    environment["RAY_TMPDIR"] = places.name
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    head = ("--head", "--include-dashboard=false", f"--port={port}", "--node-ip-address=127.0.0.1")
    nodes = [
        subprocess.Popen(
            [*RAY, "start", *head, f"--num-cpus={head_cpus}", *common], env=environment
        )
    ]
    try:
        wait_for(port, nodes[0], ended)
        for one in cpus:
            joining = (f"--address={address}", "--node-ip-address=127.0.0.1", f"--num-cpus={one}")
            nodes.append(subprocess.Popen([*RAY, "start", *joining, *common], env=environment))
        served = subprocess.Popen([*SERVE, "run", config, f"--address={address}"], env=environment)
        nodes.append(served)
        while not ended.wait(1.0):
            if served.poll() is not None:
                return served.returncode or 1
        served.send_signal(signal.SIGINT)
        served.wait(END_S)
        return 0
    finally:
        for child in reversed(nodes):
            child.terminate()
        for child in nodes:
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
        places.cleanup()


def wait_for(port: int, head: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """Return when the head listens, or when nobody wants it any more.

    Raises:
        SystemExit: It has ended.
    """
    while not ended.wait(0.5):
        if head.poll() is not None:
            raise SystemExit(f"the head ended with status {head.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
