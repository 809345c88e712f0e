"""Every engine on the same work: agreement first, then time. May import all of the project; nothing imports it."""
