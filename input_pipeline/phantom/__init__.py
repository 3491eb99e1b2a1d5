"""Paired slides of stained tissue, drawn from a known model: `write_cohort` for files, `draw_slide` in memory."""

from .cohort import PhantomError, write_cohort
from .slide import Slide, draw_partner, draw_slide, paint, paint_nuclei

__all__ = ["PhantomError", "Slide", "draw_partner", "draw_slide", "paint", "paint_nuclei", "write_cohort"]
