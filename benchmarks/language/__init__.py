"""Real language models under every method: loss, retrieval, free running, the papers' premises."""
