"""Artifact formats: one file each with its reader beside it, its name the value of --format."""
