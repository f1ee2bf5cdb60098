"""The Phi block on plain tensors, rope, tokenizer facts, and who can supply weights."""
