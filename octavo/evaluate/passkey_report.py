"""What passkey tries came to: a table for the terminal, JSON, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from octavo.config import format_size
from octavo.errors import ConfigError
from octavo.evaluate.passkey_run import Outcome, Trial

WRONG, RIGHT = "#d95f02", "#1b9e77"  # told apart by everyone (ColorBrewer's Dark2)


@dataclass
class PasskeyReport:
    """One model's outcomes, as far as there are any.

    Attributes:
        model: as it was asked for.
        weights: what they are stored in, such as `bf16` or `W8A8`.
        kv_cache_dtype: as it was asked for.
        lengths, depths: of the trials, in order.
        outcomes: in the order of the trials.
    """

    model: str
    weights: str
    kv_cache_dtype: str
    lengths: Sequence[int]
    depths: Sequence[float]
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The model in a few words."""
        kv = "" if self.kv_cache_dtype == "auto" else f", {self.kv_cache_dtype} KV"
        return f"{Path(self.model).name or self.model} ({self.weights}{kv})"

    def score(self, length: int | None = None, depth: float | None = None) -> tuple[int, int]:
        """(right, tries) of one length or all, at one depth or all."""
        chosen = [
            outcome.is_right
            for outcome in self.outcomes
            if length in (None, outcome.trial.length) and depth in (None, outcome.trial.depth)
        ]
        return sum(chosen), len(chosen)

    def table(self) -> Table:
        """Right of tries: a row a depth, a column a length."""
        table = Table(title=self.title, show_footer=True)
        table.add_column("depth", footer="all", justify="right")
        for length in self.lengths:
            table.add_column(
                format_size(length), footer=_share(*self.score(length)), justify="right"
            )
        table.add_column("all", footer=_share(*self.score()), justify="right")
        for depth in self.depths:
            cells = [_count(*self.score(length, depth)) for length in self.lengths]
            table.add_row(_percent(depth), *cells, _count(*self.score(depth=depth)))
        return table

    def to_json(self) -> dict[str, Any]:
        """Scores by length, and every trial with its answer."""
        scores = {length: self.score(length) for length in self.lengths}
        right, tries = self.score()
        return {
            "model": self.model,
            "weights": self.weights,
            "kv_cache_dtype": self.kv_cache_dtype,
            "right": right,
            "tries": tries,
            "by_length": [
                {"length": length, "right": right, "tries": tries}
                for length, (right, tries) in scores.items()
            ],
            "trials": [
                asdict(o.trial)
                | {
                    "n_prompt_tokens": o.n_prompt_tokens,
                    "n_cached_tokens": o.n_cached_tokens,
                    "answer": o.answer,
                    "right": o.is_right,
                    "seconds": round(o.seconds, 3),
                }
                for o in self.outcomes
            ],
        }

    def take_over(self, entry: dict[str, Any], trials: Sequence[Trial]) -> None:
        """Begin with the outcomes of an earlier run that made the same trials.

        Args:
            entry: that run's `to_json`.
            trials: of this run; the earlier one may have made only the first of them.

        Raises:
            ConfigError: other trials.
        """
        self.weights = entry["weights"]
        for trial, told in zip(trials, entry["trials"], strict=False):
            if any(told[name] != value for name, value in asdict(trial).items()):
                raise ConfigError(f"its tries of {self.model} are not those that are asked for")
            self.outcomes.append(
                Outcome(
                    trial, told["n_prompt_tokens"], told["n_cached_tokens"], told["answer"],
                    told["seconds"],
                )
            )  # fmt: skip


def draw(reports: Sequence[PasskeyReport], path: Path) -> None:
    """One grid a model, beside each other: length by depth, each cell by its share of right.

    Needs matplotlib.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    colours = LinearSegmentedColormap.from_list("passkey", [WRONG, "#f2e6c9", RIGHT])
    lengths, depths = reports[0].lengths, reports[0].depths
    width = 1.4 + len(reports) * (1 + 0.75 * len(lengths))
    figure = Figure(figsize=(max(width, 4), 1.6 + 0.36 * len(depths)), layout="constrained")
    grids = figure.subplots(1, len(reports), squeeze=False, sharey=True)[0]
    for axes, report in zip(grids, reports, strict=True):
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                right, tries = report.score(length, depth)
                colour = colours(right / tries) if tries else "#eeeeee"
                axes.add_patch(_cell(x, y, colour))
                style = {"ha": "center", "va": "center", "fontsize": 9}
                axes.text(x, y, _count(right, tries), color="white" if tries else "grey", **style)
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.set_xticks(range(len(lengths)), [format_size(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [_percent(depth) for depth in depths])
        axes.set_xlabel("tokens")
        axes.set_title(f"{report.title}\n{_share(*report.score())}", fontsize=10)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    grids[0].set_ylabel("depth of the key")
    figure.suptitle("Passkey: right answers of tries")
    figure.savefig(path, dpi=120)


def _cell(x: int, y: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=colour)


def _count(right: int, tries: int) -> str:
    return f"{right}/{tries}" if tries else ""


def _share(right: int, tries: int) -> str:
    return f"{right}/{tries} = {right / tries:.0%}" if tries else ""


def _percent(depth: float) -> str:
    return f"{100 * depth:.3g} %"
