"""Pictures of runs and results, and the page that holds them."""

from dan_fast.reporting.curves import plot_curves, read_scalars
from dan_fast.reporting.heatmaps import plot_attention
from dan_fast.reporting.html import Figure, Table, write_report
from dan_fast.reporting.ranked import plot_ranked_lists, ranked_list

__all__ = [
    "Figure",
    "Table",
    "plot_attention",
    "plot_curves",
    "plot_ranked_lists",
    "ranked_list",
    "read_scalars",
    "write_report",
]
