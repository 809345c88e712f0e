"""The models that are compared, and the files that engines read of them."""
