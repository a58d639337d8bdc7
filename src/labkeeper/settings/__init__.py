"""The settings of a keeper."""
