"""What is known of a model's weights and results, and how it is proven."""
