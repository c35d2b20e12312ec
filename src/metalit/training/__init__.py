"""One outer step, of any learner: its gradient, its context, batches in chunks, several steps as one loop, ranks."""
