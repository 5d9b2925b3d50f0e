"""Photographs from scikit-learn and scikit-image."""

import numpy as np


NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def load_photographs() -> list[np.ndarray]:
    """Six RGB photographs `(height, width, 3)` of 8 bits, 300 pixels high at least.

    Raises:
        ImportError: if scikit-learn or scikit-image is not installed.
    """
    try:
        import skimage.data
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("The photographs need the extra `train`: pip install 'hf_attn[train]'") from error
    return [*load_sample_images().images, *(getattr(skimage.data, name)() for name in NAMES)]
