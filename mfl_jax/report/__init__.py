"""results.json and pictures in, one HTML file out: `report.save(folder, ...)`, or `report.write(path, ...)` alone."""

from mfl_jax.report.folder import remake, save
from mfl_jax.report.page import render, write
from mfl_jax.report.schema import ReportError, validate
from mfl_jax.report.tables import readme

__all__ = ["ReportError", "readme", "remake", "render", "save", "validate", "write"]
