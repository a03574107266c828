#!lua
-- Add an image unless the backlog is full, and never the same one twice.
-- KEYS: images, and where the producer gave an id: what remembers it.
-- ARGV: most images, seconds to remember, field, value, field, value ...
-- Returns {entry id or '', images on the stream}.
-- No allow-oom flag: a server at its memory limit refuses before anything is written.

if KEYS[2] then
    local before = redis.call('GET', KEYS[2])
    if before then
        return {before, redis.call('XLEN', KEYS[1])}
    end
end

local length = redis.call('XLEN', KEYS[1])
if length >= tonumber(ARGV[1]) then
    return {'', length}
end

local id = redis.call('XADD', KEYS[1], '*', unpack(ARGV, 3))
if KEYS[2] then
    redis.call('SET', KEYS[2], id, 'EX', ARGV[2])
end
return {id, length + 1}
