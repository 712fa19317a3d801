"""What the attention operators share: their view of a cache and the folded products over pages."""
