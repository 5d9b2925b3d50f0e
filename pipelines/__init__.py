"""Pipelines for tasks that transformers has none for, one file a task."""
