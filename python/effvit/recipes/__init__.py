"""End-to-end recipes, each a command: `python -m effvit.recipes.<name>`."""
