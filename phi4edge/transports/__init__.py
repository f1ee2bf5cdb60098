"""Ways to reach a device: one file each, its name the value of --transport."""
