"""What a compression did: one row per layer, totals, and both sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CompressionReport:
    """The outcome of `compress`.

    `rows` has one dict per targeted layer:

    - `layer`, `role`, `shape` [m, n], `rank` (None: kept dense, with the `reason`);
    - `params_before`, `params_after`: of the weight, and of a bias that the method added. A bias that was there
      before is in neither, as it does not change;
    - `error`: in the method's own norm (see its page), `relative_error`: the same over that norm of the whole weight;
    - `output_error`: √(E‖ŷ − y‖² / E‖y‖²) over the calibration tokens, each layer fed with the original inputs;
      None without calibration.
    """

    method: str
    ratio: float
    allocation: str
    rows: list[dict[str, Any]]
    model_params: tuple[int, int]  # before, after: all parameters of the model
    model_bytes: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None  # calibration tokens of the layer that saw most
    skipped: dict[str, str] = field(default_factory=dict)  # targets that are no linear layer, with the reason

    @property
    def params_before(self) -> int:
        """Parameters of the targeted weights before."""
        return sum(r["params_before"] for r in self.rows)

    @property
    def params_after(self) -> int:
        """Parameters of the targeted weights after; at most floor(ratio * params_before)."""
        return sum(r["params_after"] for r in self.rows)

    @property
    def kept(self) -> float:
        """params_after / params_before."""
        return self.params_after / self.params_before

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "method": self.method,
            "options": self.options,
            "ratio": self.ratio,
            "allocation": self.allocation,
            "kept": self.kept,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "model_params_before": self.model_params[0],
            "model_params_after": self.model_params[1],
            "model_bytes_before": self.model_bytes[0],
            "model_bytes_after": self.model_bytes[1],
            "calibration_tokens": self.tokens,
            "skipped": self.skipped,
            "rows": self.rows,
        }

    def save_json(self, path: str | Path) -> None:
        """Write `as_dict` to a file."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """A rich table: one row per layer, totals in the caption."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        a, b = self.model_params
        x, y = self.model_bytes
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            title=f"{self.method}: {self.kept:.1%} of the targeted parameters kept (asked for {self.ratio:.0%})",
            caption=f"targeted layers {self.params_before:,} → {self.params_after:,} parameters · "
            f"model {a:,} → {b:,} parameters, {x / 1e6:.1f} → {y / 1e6:.1f} MB (dense: {x / 1e6:.1f} MB)",
        )
        table.add_column("layer", overflow="fold")
        for name in ("shape", "rank", "kept", "error", "output error"):
            table.add_column(name, justify="right", no_wrap=True)
        for r in self.rows:
            table.add_row(
                r["layer"],
                "x".join(map(str, r["shape"])),
                "dense" if r["rank"] is None else str(r["rank"]),
                f"{r['params_after'] / r['params_before']:.0%}",
                _share(r["relative_error"]),
                _share(r["output_error"]),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True)
        with console.capture() as held:
            console.print(self.table())
        return held.get()


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"
