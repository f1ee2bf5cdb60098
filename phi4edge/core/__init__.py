"""Errors, hashing, atomic writes, memory, events, the registry of plug-ins and the run directory."""
