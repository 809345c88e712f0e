"""Results to a page with plots, for people and for programs."""
