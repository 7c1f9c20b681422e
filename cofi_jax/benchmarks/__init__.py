"""How fast things are, beside others; nothing imports this."""
