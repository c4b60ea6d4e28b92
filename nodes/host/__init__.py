"""What ComfyUI must be told about each family: how it loads, conditions, samples and previews."""
