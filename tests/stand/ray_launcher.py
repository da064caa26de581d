"""What Ray runs in place of Python for a worker: asks for a fork and ends with it.

Started with ``-I -S``, so it imports next to nothing. See `tests.stand.forked_ray`.
"""

import argparse
import json
import os
import socket
import sys

WORKER_FD = 250  # in the worker: the other end of the connection


def main() -> None:
    path, _, *arguments = sys.argv[1:]
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", default="{}")
    parser.add_argument("--language")
    known, rest = parser.parse_known_args(arguments)
    context = json.loads(known.serialized_runtime_env_context)
    told = {"arguments": rest, "environment": {**os.environ, **context.get("env_vars", {})}}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
        one.connect(path)
        socket.send_fds(one, [json.dumps(told).encode()], [0, 1, 2])
        one.recv(1)  # nothing comes: the worker has ended


if __name__ == "__main__":
    main()
