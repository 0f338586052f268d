"""Training. loop.py takes everything from outside: what is trained, on what, by which loss, and where it is kept."""
