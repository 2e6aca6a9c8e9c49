"""Vision: rotated digits and trees of images, trained by a ViT."""
