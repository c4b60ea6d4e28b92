"""Networks that turn a picture into the condition of a ControlNet."""
