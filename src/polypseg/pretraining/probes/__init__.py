"""What an encoder's embeddings are worth: labelled frames, k-NN and linear probes, their report."""
