"""The application: what Hydra starts."""
