"""A model on frames: preparation, the runtimes that compute it, masks and lesions."""
