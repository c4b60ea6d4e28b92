"""Everything that ComfyUI must know about a family: how it loads, conditions, samples and previews."""
