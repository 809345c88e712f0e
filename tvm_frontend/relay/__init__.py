"""Does the same by TVM's former importer, Relay: TVM 0.17 in an environment of its own, which `make relay` sets up."""
