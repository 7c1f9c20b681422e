"""The encoder: its sizes, its prunable axes, its layers and the model itself."""
