"""Tasks, their rows, batches of them, and scores."""
