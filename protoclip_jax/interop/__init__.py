"""To and from other codebases."""
