"""Weights in other formats, proven by outputs."""
