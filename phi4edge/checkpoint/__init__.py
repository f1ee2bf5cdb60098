"""Checkpoints: config.json, safetensors headers, bounded reads, and the hub."""
