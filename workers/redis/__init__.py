"""The connection to the stream server, its scripts and errors, and the embedded server."""
