"""Tables and figures of an evaluation's results."""
