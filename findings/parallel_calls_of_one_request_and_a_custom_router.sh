#!/bin/sh
# ray[serve] 2.60.0: a request router of one's own, written as Ray's guide shows it (a subclass of
# RequestRouter with choose_replicas), answers one of several calls that a deployment makes at
# once for one request. The others wait for ever, with idle replicas: all calls made within a
# request have the same internal id, and such a router finds waiting calls by it. The tasks that
# look for them in vain are those that route everybody's calls. With Ray's FIFOMixin all are answered.
# Ends with 0 while that is so, with 1 when it changes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
cat > "$work/routers.py" <<'PYTHON'
import asyncio

from ray.serve.request_router import FIFOMixin, RequestRouter


class Plain(RequestRouter):
    async def choose_replicas(self, candidate_replicas, pending_request=None):
        await asyncio.sleep(0.05)  # as one that has to look something up
        return [candidate_replicas]


class Fifo(FIFOMixin, Plain):
    pass
PYTHON
cat > "$work/calls.py" <<'PYTHON'
import asyncio
import sys

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from routers import Fifo, Plain


@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Echo:
    async def __call__(self, number):
        return number


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Ingress:
    def __init__(self, echo):
        self.echo = echo

    async def __call__(self, request):
        calls = [self.echo.remote(number) for number in range(3)]

        async def wait(call):
            try:
                return await asyncio.wait_for(call, 15)
            except (asyncio.TimeoutError, asyncio.CancelledError):
                return None

        return await asyncio.gather(*(wait(one) for one in calls))


def answered(router, name):
    chosen = RequestRouterConfig(request_router_class=router)
    app = Ingress.bind(Echo.options(request_router_config=chosen).bind())
    found = serve.run(app, name=name, route_prefix=None).remote(None).result(timeout_s=120)
    serve.delete(name)
    return sum(one is not None for one in found)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
serve.start(proxy_location="Disabled")
plain, fifo = answered(Plain, "plain"), answered(Fifo, "fifo")
print(f"ray {ray.__version__}: of 3 calls at once, a plain router answers {plain}, one with FIFOMixin {fifo}")
serve.shutdown()
sys.exit(0 if (plain, fifo) == (1, 3) else 1)
PYTHON
cd "$work"
PYTHONPATH=$work "$work/venv/bin/python" calls.py 2>log || { tail -20 log; exit 1; }
