"""Publishing: the folder of a model, its card, its upload, dataset cards, the app and the browser page."""
