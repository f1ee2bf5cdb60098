"""Tasks: questions that models answer or choose among, scored, and paired with the full-precision model's answers."""
