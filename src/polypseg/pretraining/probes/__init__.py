"""What an encoder's embeddings are worth: labeled frames, k-NN and linear probes, their report."""
