"""Function-preserving changes of the full-precision weights, made before they are rounded."""
