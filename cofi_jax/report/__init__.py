"""Tables, figures, pages and model cards from plain data."""
