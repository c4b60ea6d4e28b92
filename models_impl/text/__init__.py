"""Text encoders as the trainer needs them, and what their files are known by."""
T5_FAMILY = "t5_encoder"  # in the metadata of our exports
MAX_LENGTH = 512  # tokens that a T5 reads unless its file says otherwise
