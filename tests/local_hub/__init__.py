"""A small Hub for development and tests: speaks the protocol of huggingface_hub, keeps everything in one folder."""
