"""The command line: every flag, and what is checked before a model is loaded."""
