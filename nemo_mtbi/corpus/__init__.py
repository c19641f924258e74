"""How the corpus steps (prepare, cache, targets) divide their work: shards, and who works on them."""
