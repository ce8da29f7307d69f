"""Reports for people: one self-contained HTML file of findings, groups of faces to decide on, figures and charts."""

from facepipe.reports.html import write_report
from facepipe.reports.model import (
    Choice,
    Decision,
    Face,
    Figure,
    Group,
    Histogram,
    Mark,
    PhotoPlace,
    Report,
    ReviewTarget,
    Series,
    Step,
    Table,
)

__all__ = [
    "Choice",
    "Decision",
    "Face",
    "Figure",
    "Group",
    "Histogram",
    "Mark",
    "PhotoPlace",
    "Report",
    "ReviewTarget",
    "Series",
    "Step",
    "Table",
    "write_report",
]
