"""Quality and speed of a quantised cache against ordinary attention, measured on real text."""
