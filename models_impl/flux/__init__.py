"""FLUX.1: rectified flow on latents (Black Forest Labs), the base that PixelPonder was trained on."""
