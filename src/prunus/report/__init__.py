"""Results for people: tables and progress in the terminal, pictures, and the numbers line by line in a file."""

from prunus.report.curves import Point, plot_accuracy, plot_run
from prunus.report.landscape import plot_lines, plot_plane
from prunus.report.metrics import append_metrics, read_metrics
from prunus.report.plots import plot_compression, plot_grid
from prunus.report.rates import plot_sweep
from prunus.report.terminal import Advance, format_value, markdown_table, print_table, progress

__all__ = [
    "Advance",
    "Point",
    "append_metrics",
    "format_value",
    "markdown_table",
    "plot_accuracy",
    "plot_compression",
    "plot_grid",
    "plot_lines",
    "plot_plane",
    "plot_run",
    "plot_sweep",
    "print_table",
    "progress",
    "read_metrics",
]
