"""Reports for people: one self-contained HTML file of figures, histograms, tables and groups of faces."""

from facepipe.reports.html import write_report
from facepipe.reports.model import Face, Figure, Group, Histogram, Mark, Report, Series, Table

__all__ = ["Face", "Figure", "Group", "Histogram", "Mark", "Report", "Series", "Table", "write_report"]
