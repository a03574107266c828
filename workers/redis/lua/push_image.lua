-- Add an image unless the backlog is full, and never the same one twice. Behind _capacity.lua.
-- KEYS: images, counters, what was measured, and where the producer gave an id: what remembers it.
-- ARGV: most images, most bytes, seconds to remember, field, value, field, value ...
-- Returns {entry id}, or {'', 'images' or 'bytes', how many there are}.

local images, counters, measured, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local before = seen and redis.call('GET', seen)
if before then
    -- The counter is a write of this connection: a WAIT behind it waits for the first push too.
    redis.call('HINCRBY', counters, 'duplicates', 1)
    return {before}
end

local refused = refusal(images, counters, measured, ARGV[1], ARGV[2])
if refused then
    return refused
end

local id = add(images, measured, {unpack(ARGV, 4)})
if seen then
    redis.call('SET', seen, id, 'EX', ARGV[3])
end
return {id}
