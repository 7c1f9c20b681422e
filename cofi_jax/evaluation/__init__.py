"""Predictions, scores and latency of models."""
