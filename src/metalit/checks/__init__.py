"""What is refused before training: options, callbacks, ranks and checkpoints that could not do what they say."""
