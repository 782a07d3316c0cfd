"""The one file of a run, and what is made of it."""
