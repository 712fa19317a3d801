"""Measures operators alone: time against the fastest 16-bit attention of the same process, with the error beside it."""
