"""How requests reach the service: connections, bodies, and who sent them."""
