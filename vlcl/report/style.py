"""How the pictures of all reports look: colours and markers. No torch, no matplotlib."""

INK, MUTED, RULE = "#1b1f24", "#5c6570", "#dfe3e8"  # as in report.html
# Told apart with any colour vision (after Okabe and Ito), and by their markers in print.
COLOURS = ("#2563c9", "#d2600f", "#00836a", "#b0448f", "#8a6d00", "#3f9fd6", "#555c64", "#c22f3d")
MARKERS = "osD^vPX*"
