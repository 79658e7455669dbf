"""Whole jobs on top of the models: load one, embed texts, read and write files of rows."""
