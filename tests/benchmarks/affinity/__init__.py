"""The rule of prompt-cache affinity in a simulated fleet: `python -m tests.benchmarks.affinity`.

Discrete events on a simulated clock, the same in every run of a seed. In reading order: `workloads`, `machine`,
`fleet`, `policies` (what it is compared with), `product` (what routers use), `figures`, `__main__`.
"""
