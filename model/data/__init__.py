"""A row of a data file becomes part of a batch."""
