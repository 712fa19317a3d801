"""People judge pairs of answers without knowing which side is which (docs/review.md)."""
