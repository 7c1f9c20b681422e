"""Training: the losses, the objectives, the step, and the loop around it."""
