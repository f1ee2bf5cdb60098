"""Runtimes that serve an artifact: one file each."""
