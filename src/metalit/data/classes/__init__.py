"""Tasks of classes: where classes come from, how they are split, and N-way K-shot episodes of them."""
