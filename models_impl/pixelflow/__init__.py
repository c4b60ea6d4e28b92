"""PixelFlow (arXiv 2504.07963): flow matching on raw pixels through a cascade of resolutions."""
