"""`python -m tests.benchmarks.restart`: the whole fleet is restarted one after the other, first its nodes, then its MLX
servers, under requests. Tells how long each restart took, how many requests failed, and how long the slowest one took.
"""

from __future__ import annotations

import argparse
import time

from fleet_worker import Router, Settings
from fleet_worker.testing import embedded_broker
from tests.fleets import Crowd, Load, report
from tests.hosts import Hosts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minis", type=int, default=4)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second")
    parser.add_argument("--streams", type=int, default=4, help="streams of 10 s that are read all the time")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds that running requests have to end")
    options = parser.parse_args()
    with (
        embedded_broker() as broker_url,
        Hosts(broker_url, options.minis, natural=200, grace=options.grace, token_interval=0.05) as hosts,
        Router(Settings(broker_url=broker_url)) as router,
    ):
        hosts.wait_until_ready(router)
        for command in (["restart", "--all"], ["restart", "--all", "--server"]):
            began = time.monotonic()
            with Load(router, hosts, options.rate) as load, Crowd(router, hosts, at_once=options.streams) as crowd:
                done = hosts.run(*command, within=240.0)
                seconds = time.monotonic() - began
            print(f"$ fleet-worker {' '.join(command)}   (exit code {done.returncode}, {seconds:.0f} s)")
            print(done.stdout + done.stderr, end="")
            slowest = f"the slowest took {max(load.seconds):.1f} s"
            print(f"{load.asked} requests, {len(load.failed)} failed {sorted(set(load.failed))}, {slowest}")
            report("streams meanwhile", crowd.told)


if __name__ == "__main__":
    main()
