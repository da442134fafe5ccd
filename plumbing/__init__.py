"""Needed to run, not to understand: flags, files, formats, checkpoints, logs, the vLLM engine, the report."""
