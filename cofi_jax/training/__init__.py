"""Losses, objectives, the step and the loop around it."""
