"""Distillation: with the codes frozen, what stays continuous is tuned end to end on the full-precision model."""
