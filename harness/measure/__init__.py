"""Counters that never vary, and clocks that are honest."""
