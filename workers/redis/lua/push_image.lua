-- Add an image unless the backlog is full or its id was pushed before. Prelude: _capacity.lua.
-- KEYS: images, counters, the cached size, and where the producer gave an id: the key that remembers it.
-- ARGV: most images, most bytes, seconds to remember the id, field, value, field, value ...
-- Returns {entry id}, or the refusal {'', 'images' or 'bytes', how many there are}.

local images, counters, cache, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local first_id = seen and redis.call('GET', seen)
if first_id then
    -- The counter is a write of this connection: a WAIT after it waits for the first push too.
    redis.call('HINCRBY', counters, 'duplicates', 1)
    return {first_id}
end

local refused = refusal(images, counters, cache, ARGV[1], ARGV[2])
if refused then
    return refused
end

local id = add(images, cache, {unpack(ARGV, 4)})
if seen then
    redis.call('SET', seen, id, 'EX', ARGV[3])
end
return {id}
