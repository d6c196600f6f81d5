"""The benchmark's data sets, class names and templates as JSON."""
