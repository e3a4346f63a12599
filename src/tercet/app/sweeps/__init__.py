"""Sweeps: summaries, joblib's jobs, Optuna and Ray."""
