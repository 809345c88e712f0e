"""Every engine on one GPU: what goes in and comes out stays there, and its own clock times it."""
