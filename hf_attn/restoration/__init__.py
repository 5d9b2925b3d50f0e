"""What image-restoration families share: configuration, shell, window attention, tiling, image quality."""
