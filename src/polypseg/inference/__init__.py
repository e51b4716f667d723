"""A model on frames: input files, videos and the pipeline between reading and writing."""
