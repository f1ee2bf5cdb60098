"""Tasks: questions that a model answers or chooses among, scored, and paired with the full-precision model's answers."""
