"""PixArt-alpha, -delta and -Sigma (arXiv 2310.00426, 2401.05252, 2403.04692): a text-conditional DiT on VAE latents."""
