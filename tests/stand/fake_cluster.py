"""A cluster in its real processes around the fake engine, with the registry of `fake_server`.

Run as a program by `tests.stand.live`, where the tests are to ask a cluster.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from server.cluster.local import prepare_environment, run_here
from server.settings import Settings, load_settings

if TYPE_CHECKING:
    from ray.serve import Application

    from server.cluster.application import ClusterOptions


def application(settings: Settings, options: ClusterOptions) -> Application:
    """The deployments of a cluster, but for what its HTTP replicas know of a base."""
    from server.cluster.application import HttpDeployment, deployed
    from server.cluster.ingress import IngressPlan
    from server.edge.admit.bounds import Bounds
    from server.edge.admit.shared_load import SharedLoad
    from server.edge.link.link import Link
    from server.edge.service import Service

    class FakeHttp(HttpDeployment):
        def make_service(
            self, plan: IngressPlan, link: Callable[[SharedLoad, Bounds], Link]
        ) -> Service:
            from server.edge.service import Service
            from tests.stand import shifted_clock
            from tests.stand.fake_server import FakeRegistry, fake_base

            shifted_clock.install(plan.settings.data_dir)
            registry: Any = FakeRegistry()
            base = fake_base(plan.settings)
            usage_file = f"key-usage-{self.counted_as}.json"
            return Service(
                plan.settings, base, registry, lambda: plan.settings, link, usage_file=usage_file
            )

    return deployed(
        settings, options, place="none", base_name="fake-base", base_digest="", http=FakeHttp
    )


def main(engine: str, replicas: str) -> None:
    settings = load_settings({})
    prepare_environment(settings)  # before Ray is imported
    from server.cluster.application import ClusterOptions
    from server.edge.processes.failed_start import StartFailed

    options = ClusterOptions(replicas=int(replicas), engine=engine)
    try:
        run_here(settings, options, say=print, application=application)
    except StartFailed as failure:
        sys.stderr.write(f"hira: {failure}\n")
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
