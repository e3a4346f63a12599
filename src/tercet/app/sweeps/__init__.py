"""Sweeps: the search with Optuna, jobs on Ray, summaries over seeds, and the orderly stop of jobs."""
