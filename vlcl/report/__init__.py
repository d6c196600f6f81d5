"""What a run shows: report.html (page.py), its curves (figures.py) and retrieval examples (pictures.py)."""
