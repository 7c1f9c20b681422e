"""Saved models in the formats of other runtimes, each verified."""
