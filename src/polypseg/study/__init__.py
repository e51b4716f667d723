"""A study as a matrix of cells that several workers fill through one shared folder, without doing one twice."""
