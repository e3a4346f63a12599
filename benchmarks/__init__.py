"""Side by side with other libraries; each module is a command, ``python -m benchmarks.<module>``."""
