"""Benchmarks: ``python -m bench.loss`` times the losses, ``python -m bench.report`` tabulates the figures."""
