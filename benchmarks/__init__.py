"""Latency measurements; they never decide whether a test passes."""
