"""Paired benchmarks that print ratios: `python -m loadtests.bench`.

Both sides of a comparison run in one process, in turn, with the environment that the server gives
its worker: OpenMP reads its wait policy when torch is first imported, so it is set here.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # why: server/edge/processes/start.py
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
