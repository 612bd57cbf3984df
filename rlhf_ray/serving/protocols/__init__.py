"""The interfaces that the service answers: what a protocol is, one module per family, and the list of all of them."""
