"""Fine-tuning: augmentation, loading, the loop, and what every long run keeps in its folder."""
