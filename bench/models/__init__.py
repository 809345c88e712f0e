"""The models to compare, and the files that engines need of them."""
