"""What ComfyUI must know about each family: how it loads, conditions, samples and previews."""
