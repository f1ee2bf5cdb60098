"""What a device says of its clocks, its heat and its power before, while and after it decodes."""
