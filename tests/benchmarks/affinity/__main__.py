"""Prints a table for each workload: python -m tests.benchmarks.affinity [workload ...] [--seeds 12] [--first 1000]"""

from __future__ import annotations

import argparse
import statistics

from tests.benchmarks.affinity.figures import POLICIES, PRODUCT, Figures, simulate
from tests.benchmarks.affinity.workloads import WORKLOADS

HEAD = f"{'policy':10} {'p50':>7} {'p95':>7} {'mean':>7} {'cached':>7} {'Jain':>6} {'moved':>6} {'answered':>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", choices=[*WORKLOADS, []], metavar="WORKLOAD")
    parser.add_argument("--policies", nargs="*", default=[*POLICIES], choices=POLICIES, metavar="POLICY")
    parser.add_argument("--routers", nargs="*", type=int, default=[1, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    for workload in args.workloads or WORKLOADS:
        for routers in args.routers:
            print(f"\n{workload}, {routers} routers: seconds to the first token\n{HEAD}")
            found = {}
            for policy in args.policies:
                seeds = range(args.first, args.first + args.seeds)
                found[policy] = [simulate(workload, policy, seed, routers) for seed in seeds]
                print(_row(policy, found[policy]), flush=True)
            _compare(found)


def _row(policy: str, found: list[Figures]) -> str:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(each, name) for each in found)

    return (
        f"{policy:10} {mean('p50'):7.2f} {mean('p95'):7.1f} {mean('mean'):7.2f} {mean('cached'):7.1%} "
        f"{min(each.jain for each in found):6.3f} {mean('moved'):6.1%} {mean('answered'):9.0f}"
    )


def _compare(found: dict[str, list[Figures]]) -> None:
    """Print the product's times divided by those of the others, seed by seed: the medians, and the worst mean."""
    product = found.get(PRODUCT, [])
    for policy in found:
        if policy != PRODUCT and product:
            pairs = list(zip(product, found[policy], strict=True))
            means = [ours.mean / other.mean for ours, other in pairs]
            p95 = statistics.median(ours.p95 / other.p95 for ours, other in pairs)
            print(f"product / {policy}: mean {statistics.median(means):.2f} (worst {max(means):.2f}), p95 {p95:.2f}")


if __name__ == "__main__":
    main()
