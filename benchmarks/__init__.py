"""Benchmarks, each against something outside this toolkit: python -m benchmarks.NAME."""
