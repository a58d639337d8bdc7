"""The keeper's side of the edge: finds or starts it, restarts it, and pushes its routes."""
