"""What is known of a model's weights, and where its files are."""
