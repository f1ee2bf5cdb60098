"""Solvers: one file each, its name the value of --method."""
