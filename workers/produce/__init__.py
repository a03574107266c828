"""Images onto the stream: admission, de-duplication, durability."""
