"""Random-feature attention as an estimator of scikit-learn."""

import numpy
import torch


try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError("The estimator needs scikit-learn: `pip install 'hf_attn[train]'`.") from error

from .configuration_random_feature_attention import RandomFeatureAttentionConfig
from .modeling_random_feature_attention import RandomFeatureAttentionModel
from .ridge import check_penalty


class RandomFeatureAttentionRegressor(RegressorMixin, BaseEstimator):
    """Ridge regression on the features of random-feature attention.

    Args:
        num_heads: heads of the layer.
        biased: whether the random matrices have a mean (BRFA).
        penalty: lambda of the ridge regression, at least 0.
        weight_std: standard deviation of the entries of the random matrices.
        input_dim: width of a token, for inputs that are flat rows `(n, tokens * input_dim)`, as most of scikit-learn passes
            them on. Not needed for `(n, tokens, input_dim)`.
        random_state: seed, or a generator, of the random matrices.

    Attributes:
        model_: the fitted [`RandomFeatureAttentionModel`], in float64.
        n_features_in_: numbers in a row: tokens, for inputs with three axes, or columns of a flat row.
    """

    def __init__(
        self,
        num_heads: int = 1000,
        biased: bool = False,
        penalty: float = 1e-6,
        weight_std: float = 0.5,
        input_dim: int | None = None,
        random_state=None,
    ):
        self.num_heads = num_heads
        self.biased = biased
        self.penalty = penalty
        self.weight_std = weight_std
        self.input_dim = input_dim
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        # With one column per token the model does not depend on the order of the columns, because keys are a set.
        tags.regressor_tags.poor_score = True
        return tags

    def fit(self, X, y):
        """Draw the random matrices and fit the values.

        Args:
            X: `(n, 1 + keys, width)`, the query first and tokens meant to have norm 1, or the same as flat rows.
            y: `(n,)`.

        Raises:
            ValueError: for flat rows whose width is not a multiple of `input_dim`, sequences without a key, a negative penalty.
        """
        check_penalty(self.penalty)
        X, y = validate_data(self, X, y, dtype=numpy.float64, allow_nd=True, y_numeric=True)
        tokens = self._tokens(X)
        config = RandomFeatureAttentionConfig(
            input_dim=tokens.shape[2],
            num_keys=tokens.shape[1] - 1,
            num_heads=self.num_heads,
            biased=self.biased,
            weight_std=self.weight_std,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            dtype="float64",
        )
        self.model_ = RandomFeatureAttentionModel._from_config(config).eval()
        self.model_.fit_ridge(tokens, torch.from_numpy(y.astype(numpy.float64)), self.penalty)
        return self

    def predict(self, X):
        """Predictions `(n,)` for inputs as in `fit`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=numpy.float64, allow_nd=True, reset=False)
        with torch.no_grad():
            return self.model_(self._tokens(X)).logits.numpy()

    def _tokens(self, rows: numpy.ndarray) -> torch.Tensor:
        if rows.ndim == 2:
            if self.input_dim is None:
                raise ValueError(
                    f"X is a 2D array of shape {rows.shape}: set input_dim to the width of a token, or reshape X to "
                    "(n, 1 + keys, width)."
                )
            if rows.shape[1] % self.input_dim != 0:
                raise ValueError(
                    f"A row of X has {rows.shape[1]} feature(s), which is not a multiple of input_dim "
                    f"({self.input_dim})."
                )
            rows = rows.reshape(len(rows), -1, self.input_dim)
        if rows.ndim != 3:
            raise ValueError(
                f"X must have the shape (n, 1 + keys, width), or two axes with input_dim; got {rows.shape}."
            )
        if self.input_dim not in (None, rows.shape[2]):
            raise ValueError(f"X has tokens of width {rows.shape[2]}, but input_dim is {self.input_dim}.")
        if rows.shape[1] < 2:
            raise ValueError("A sample has 1 feature(s) or token: a query needs at least one key.")
        return torch.from_numpy(numpy.ascontiguousarray(rows))


__all__ = ["RandomFeatureAttentionRegressor"]
