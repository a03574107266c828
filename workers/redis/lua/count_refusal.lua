#!lua flags=allow-oom
-- Count a refusal that the refusing script could not count itself, as the server was out of memory.
-- KEYS: counters.  ARGV: the counter's name.  Returns its value.

return redis.call('HINCRBY', KEYS[1], ARGV[1], 1)
