"""The method: masks, their constraint, and slicing; arrays to arrays, without I/O."""
