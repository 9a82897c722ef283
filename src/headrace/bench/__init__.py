"""Benchmarks: workloads, measurements beside the machine's limits, and checks that keep them honest."""
