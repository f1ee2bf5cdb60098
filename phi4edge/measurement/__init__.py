"""Reference logits, drift, speed and the fingerprint of the machine."""
