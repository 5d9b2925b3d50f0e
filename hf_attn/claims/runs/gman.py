"""GMAN against forecasts without a model and against torch's LSTM, on the synthetic ring of sensors, by forecast horizon.

Shown in small if GMAN's mean absolute error over all steps is below that of the historical average, of the last value and of the LSTM for every
seed, and its lead over the LSTM in percent grows from the first step to the last in the mean. Contradicted if every seed finds some peer better.
If only the growth is missing, it is not shown here.
"""

from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import nn

from ...examples.synthetic_traffic import synthetic_traffic
from ...modeling.gman.baselines import historical_average, last_value
from ...modeling.gman.configuration_gman import GMANConfig
from ...modeling.gman.data import TrafficWindows, split_by_time
from ...modeling.gman.graph import spectral_embedding
from ...modeling.gman.metrics import forecast_errors, masked_mae, observed_values
from ...modeling.gman.modeling_gman import GMANForPrediction
from ..drawing import COLORS
from ..result import Conclusion, Figure, agreement
from ..training import batches, optimise, tuned


CONTEXT = AHEAD = 6
SENSORS, STEPS_PER_DAY, NULL = 12, 48, 0.0
BATCH_SIZE = 32


class LSTMForecaster(nn.Module):
    """An LSTM over the histories of all sensors with the time of day and day of week, and a linear layer for all future steps."""

    def __init__(self, mean: float, std: float, hidden_size: int = 64):
        super().__init__()
        self.mean, self.std = mean, std
        self.lstm = nn.LSTM(SENSORS + 4, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size + 4 * AHEAD, AHEAD * SENSORS)

    def forward(self, past_values, past_time_features, future_time_features, labels=None) -> torch.Tensor:
        past = torch.cat([(past_values - self.mean) / self.std, self._circular(past_time_features)], -1)
        state = self.lstm(past)[0][:, -1]
        ahead = self.head(torch.cat([state, self._circular(future_time_features).flatten(1)], -1))
        return ahead.unflatten(-1, (AHEAD, SENSORS)) * self.std + self.mean

    @staticmethod
    def _circular(features: torch.Tensor) -> torch.Tensor:
        angles = features * torch.tensor([2 * torch.pi / 7, 2 * torch.pi / STEPS_PER_DAY])
        return torch.cat([angles.sin(), angles.cos()], -1)


def measure(work) -> dict:
    steps, days = (4, 14) if work.miniature else (300, 56)
    runs = {
        name: tuned(work, name, partial(forecast, make, steps, days))
        for name, make in (("gman", gman), ("lstm", lstm))
    }
    return {**runs, "baselines": [work.part(f"baselines-seed{seed}", baselines, days, seed) for seed in work.seeds]}


def windows(days: int, seed: int) -> tuple:
    """The synthetic data: the tables of its splits, and their windows."""
    data = synthetic_traffic(SENSORS, days, STEPS_PER_DAY, seed=seed)
    parts = split_by_time(data.speeds)
    return data, parts, {name: TrafficWindows(part, STEPS_PER_DAY, CONTEXT, AHEAD) for name, part in parts.items()}


def gman(data, statistics: tuple[float, float]) -> GMANForPrediction:
    config = GMANConfig.from_variant(
        "gman_paper",
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=4,
        context_length=CONTEXT,
        prediction_length=AHEAD,
        num_nodes=SENSORS,
        steps_per_day=STEPS_PER_DAY,
        value_mean=statistics[0],
        value_std=statistics[1],
    )
    model = GMANForPrediction(config)
    model.set_spatial_embedding(spectral_embedding(data.adjacency, config.spatial_embedding_dim))
    return model


def lstm(data, statistics: tuple[float, float]) -> LSTMForecaster:
    return LSTMForecaster(*statistics)


def forecast(make_model, steps: int, days: int, seed: int, rate: float) -> dict:
    """Train on the masked absolute error; its mean on the validation part, and for each step and all of them on the test part."""
    data, _, found = windows(days, seed)
    torch.manual_seed(seed)
    model = make_model(data, found["train"].statistics(NULL))
    order = batches(len(found["train"]), BATCH_SIZE, seed)

    def predict(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**{name: values for name, values in batch.items() if name != "labels"})
        return output if isinstance(output, torch.Tensor) else output.prediction_outputs

    def loss() -> torch.Tensor:
        batch = collate(found["train"], next(order).tolist())
        return masked_mae(predict(batch), batch["labels"], observed_values(batch["labels"], NULL))

    optimise(model, loss, steps, rate)

    @torch.no_grad()
    def errors(part: TrafficWindows) -> list[float]:
        chunks = [collate(part, chunk) for chunk in torch.arange(len(part)).split(256)]
        predictions, values = torch.cat([predict(c) for c in chunks]), torch.cat([c["labels"] for c in chunks])
        return forecast_errors(predictions.numpy(), values.numpy(), NULL)["mae"].tolist()

    return {"validation": errors(found["validation"])[-1], "errors": errors(found["test"])}


def collate(part: TrafficWindows, indices) -> dict[str, torch.Tensor]:
    rows = [part[int(index)] for index in indices]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def baselines(days: int, seed: int) -> dict[str, list[float]]:
    """Errors on the test part without a model, and those that no forecast can beat."""
    data, parts, found = windows(days, seed)
    test, values = (
        parts["test"],
        torch.stack([row["labels"] for row in map(found["test"].__getitem__, range(len(found["test"])))]),
    )
    average = historical_average(parts["train"], test.index, STEPS_PER_DAY, NULL)
    latest = last_value(test.to_numpy(), NULL)
    latest = np.where(np.isnan(latest), average, latest)
    count = len(values)
    ahead = {
        "historical average": np.stack([average[i + CONTEXT : i + CONTEXT + AHEAD] for i in range(count)]),
        "last value": np.repeat(latest[CONTEXT - 1 : CONTEXT - 1 + count, None], AHEAD, axis=1),
    }
    best = data.best_mae(AHEAD).tolist()
    return {
        **{name: forecast_errors(f, values.numpy(), NULL)["mae"].tolist() for name, f in ahead.items()},
        "best possible": [*best, fmean(best)],
    }


def _curves(data: dict) -> dict[str, list[list[float]]]:
    """Name -> for each seed the errors of the steps, and of all."""
    curves = {"GMAN": [run["errors"] for run in data["gman"]], "LSTM": [run["errors"] for run in data["lstm"]]}
    return curves | {name: [run[name] for run in data["baselines"]] for name in data["baselines"][0]}


def conclude(data: dict) -> Conclusion:
    curves = _curves(data)
    own = [errors[-1] for errors in curves["GMAN"]]
    peers = {name: [errors[-1] for errors in curves[name]] for name in ("LSTM", "historical average", "last value")}
    figures = [
        Figure.of("mean absolute error of the next 6 steps, speeds of about 60", "", own, name, values)
        for name, values in peers.items()
    ]
    best = [errors[-1] for errors in curves["best possible"]]
    figures.append(Figure.of("the same of the best possible forecast", "", best))
    leads = [
        100 * fmean(1 - a[step] / b[step] for a, b in zip(curves["GMAN"], curves["LSTM"], strict=True))
        for step in (0, AHEAD - 1)
    ]
    figures.append(Figure.of(f"lead over the LSTM at step {AHEAD}", "%", leads[1], "at step 1", leads[0]))
    orders = {name: agreement(values, own) for name, values in peers.items()}
    words = {1: "below", 0: "not clearly different from", -1: "above"}
    why = "Its error is " + ", ".join(f"{words[order]} that of the {name}" for name, order in orders.items())
    why += f"; its lead over the LSTM {'grows' if leads[1] > leads[0] else 'does not grow'} with the steps ahead."
    verdict = "not shown here"
    if min(orders.values()) < 0:
        verdict = "contradicted here"
    elif min(orders.values()) > 0 and leads[1] > leads[0]:
        verdict = "shown in small"
    return Conclusion(tuple(figures), verdict, why)


def draw(data: dict, figure) -> None:
    axes = figure.subplots()
    for (name, runs), color in zip(_curves(data).items(), COLORS, strict=False):
        means = [fmean(values) for values in zip(*(errors[:-1] for errors in runs), strict=True)]
        style = "--" if name == "best possible" else "o-"
        axes.plot(range(1, AHEAD + 1), means, style, color="black" if name == "best possible" else color, label=name)
    axes.set(xlabel="steps ahead", ylabel="mean absolute error (speeds are about 60)", ylim=(0, None))
    axes.legend()
