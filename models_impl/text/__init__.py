"""Text encoders as the trainer needs them."""
