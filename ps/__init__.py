"""The parameter server: sockets, sessions, the round loop, what a run leaves behind."""
