"""Task files for lm-evaluation-harness that read local copies of the task sets (docs/evaluation.md)."""
