"""Measures how a converted model compares with its teacher: fidelity, memory, benchmarks and the report."""
