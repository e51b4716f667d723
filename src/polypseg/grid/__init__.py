"""Grids: a study as a matrix of cells that several workers fill through one shared folder, without doing one twice."""

from polypseg.grid.cells import Cell, Start, grid_cells
from polypseg.grid.schema import Grid, load_grid
from polypseg.grid.tasks import GridData
from polypseg.grid.work import run_grid

__all__ = ["Cell", "Grid", "GridData", "Start", "grid_cells", "load_grid", "run_grid"]
