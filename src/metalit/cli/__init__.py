"""The command line: what was typed, what is built of it, where it begins, and what is said of mistakes."""
