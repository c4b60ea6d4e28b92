"""What the families share of training: draws of noise levels, noise that is not white, errors and their weights."""
