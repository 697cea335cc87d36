"""Protocols: ways to learn a task from a backbone."""
