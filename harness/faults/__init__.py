"""Deliberately wrong adapters, each named for its sin."""
