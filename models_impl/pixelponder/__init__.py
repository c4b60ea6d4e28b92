"""PixelPonder (arXiv 2503.06684): one ControlNet for FLUX that takes several conditions, patch by patch."""
