"""Simulated engines and workloads, for the demo and for routing studies."""
