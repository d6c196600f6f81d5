"""`vlcl compare`: a grid of runs (grid.py), run one after another (command.py), as one table and figure (report.py)."""
