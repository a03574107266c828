"""The connection to the stream server, its scripts and errors, and a server of our own."""
