"""UltraPixel (arXiv 2407.02158): Stable Cascade at 2K to 4K, Stage C guided by its own low-resolution features."""
