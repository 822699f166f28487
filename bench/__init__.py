"""Benchmarks: cases as data, peers measured interleaved in the same process. See README.md in this folder."""
