"""One test: a predictor on images, its scores by named conventions, and the receipt that it leaves."""
