"""Expected quality on frames without labels, an operating point from few labels, and margins with a guarantee."""
