"""A ring of sensors with rush hours, whose best possible forecast is known."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SyntheticTraffic:
    """Speeds of a ring road.

    Around a daily profile, the speed of a sensor follows its own and those of its neighbours one step before:
    `x[t] = profile[t] + z[t]`, `z[t] = A z[t - 1] + noise`.

    Attributes:
        speeds: rows are time steps, columns are sensors; 0 is a missing value.
        profile: the daily profile, of the same shape.
        transition: `A`, `(sensors, sensors)`.
        noise: standard deviation of the noise.
        adjacency: `(sensors, sensors)`, weights of the graph.
    """

    speeds: "pd.DataFrame"
    profile: np.ndarray
    transition: np.ndarray
    noise: float
    adjacency: np.ndarray

    def best_mae(self, steps: int) -> np.ndarray:
        """Mean absolute error that no forecast can beat on average, for each of the next steps."""
        covariance, power, errors = 0.0, np.eye(len(self.transition)), []
        for _ in range(steps):
            covariance = covariance + self.noise**2 * power @ power.T
            power = self.transition @ power
            errors.append(np.sqrt(2 / np.pi) * np.sqrt(np.diag(covariance)).mean())
        return np.array(errors)


def synthetic_traffic(
    num_sensors: int = 12, days: int = 56, steps_per_day: int = 48, missing: float = 0.02, seed: int = 0
) -> SyntheticTraffic:
    """Draw speeds from Monday, 2 January 2023 on.

    Args:
        num_sensors: sensors along the ring.
        days: number of days.
        steps_per_day: time steps of a day.
        missing: share of the observations that are set to 0.
        seed: of the random numbers.
    """
    import pandas as pd

    rng = np.random.default_rng(seed)
    noise = 1.5
    identity = np.eye(num_sensors)
    upstream, downstream = np.roll(identity, -1, axis=1), np.roll(identity, 1, axis=1)
    transition = 0.95 * (0.6 * identity + 0.3 * upstream + 0.1 * downstream)

    index = pd.date_range("2023-01-02", periods=days * steps_per_day, freq=pd.Timedelta(days=1) / steps_per_day)
    hour = ((index - index.normalize()) / pd.Timedelta(hours=1)).to_numpy()[:, None]
    morning, evening = rng.uniform(0.5, 1, (2, num_sensors))
    load = np.where(index.day_of_week.to_numpy() < 5, 1.0, 0.3)[:, None]
    rush = 18 * morning * np.exp(-((hour - 8) ** 2)) + 22 * evening * np.exp(-(((hour - 17.5) / 1.2) ** 2))
    profile = 62 - load * rush

    deviation, deviations = np.zeros(num_sensors), []
    for draw in rng.normal(0, noise, profile.shape):
        deviation = transition @ deviation + draw
        deviations.append(deviation)
    values = profile + np.array(deviations)
    values[rng.random(values.shape) < missing] = 0.0
    speeds = pd.DataFrame(values, index, [f"sensor_{number:02d}" for number in range(num_sensors)])
    return SyntheticTraffic(speeds, profile, transition, noise, upstream + downstream)
