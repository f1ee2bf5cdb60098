"""Devices: profiles, the catalog, what fits, and the roofline."""
