"""The encoder: its sizes, its layers, the kinds of gates on it."""
