"""From text to micro-batches: sources, tokenizer, shards, and the loader whose order is a pure function of integers."""
