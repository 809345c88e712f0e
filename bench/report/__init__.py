"""Turns results into a page with plots, for people, and JSON, for programs."""
