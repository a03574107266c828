"""Benchmarks: the peer is measured in the same run on the same work; each prints a table and, last, one JSON line."""
