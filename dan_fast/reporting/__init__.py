"""Pictures and pages about a run."""

from dan_fast.reporting.curves import plot_curves
from dan_fast.reporting.heatmaps import plot_attention
from dan_fast.reporting.html import Figure, Table, write_report
from dan_fast.reporting.ranked import plot_ranked_lists

__all__ = ["Figure", "Table", "plot_attention", "plot_curves", "plot_ranked_lists", "write_report"]
