"""A whole run: configuration, stages, evaluation and report in one folder."""
