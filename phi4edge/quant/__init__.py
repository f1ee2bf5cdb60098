"""Schemes, grids, bit packing and the quantized linear: the one definition that solvers, writers and readers share."""
