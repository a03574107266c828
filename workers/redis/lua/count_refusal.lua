#!lua flags=allow-oom
-- Count what a script could not count itself, as the server was out of memory.
-- KEYS: counters.  ARGV: what.  Returns how often it happened.

return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
