"""The least time that work can take: its operations and bytes, and the machine's rates."""
