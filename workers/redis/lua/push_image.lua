-- Add an image unless the backlog is full or its id was pushed before. Prelude: _capacity.lua.
-- KEYS: images, counters, the cached size, and where the producer gave an id: the key that remembers it, and the key
-- that has since when outcomes are remembered, in ms.
-- ARGV: most images, most bytes, seconds to remember the id, digest of the image, field, value, field, value ...
-- Returns {entry id}, or the refusal {'', 'images' or 'bytes', how many there are}, or {'', 'other image', the entry id
-- of the first}.
-- An id is remembered as its entry id, a digest (none after the replay of an old dead letter, or by an older release),
-- and 'done' once the entry has an outcome.

local images, counters, cache, seen, since = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local digest = ARGV[4]

-- An older worker, which does not remember outcomes, may run for so long beside newer ones.
local UPGRADE_MS = 3600000

-- Whether an entry was deleted by another than a worker, with its stream or alone.
local function is_lost(entry_id, state)
    if state ~= '' then
        return false
    end
    if redis.call('EXISTS', images) == 0 then
        return true
    end
    local since_ms = tonumber(redis.call('GET', since))
    if not since_ms or tonumber(string.match(entry_id, '^%d+')) < since_ms + UPGRADE_MS then
        return false
    end
    local found = redis.pcall('XRANGE', images, entry_id, entry_id)
    if found['err'] then -- a producer that may not read images
        return redis.call('XLEN', images) == 0
    end
    return #found == 0
end

local remembered, lost = seen and redis.call('GET', seen), false
if remembered then
    local first_id, first_digest, state = string.match(remembered, '^(%S+) ?(%S*) ?(%S*)$')
    lost = first_digest ~= '' and is_lost(first_id, state)
    if not lost then
        -- The counter is a write of this connection: a WAIT after it waits for the first push too.
        if first_digest == '' or first_digest == digest then
            redis.call('HINCRBY', counters, 'duplicates', 1)
            return {first_id}
        end
        redis.call('HINCRBY', counters, 'id_conflicts', 1)
        return {'', 'other image', first_id}
    end
end

local refused = refusal(images, counters, cache, ARGV[1], ARGV[2])
if refused then
    return refused
end

local id = add(images, cache, {unpack(ARGV, 5)})
if lost then
    redis.call('HINCRBY', counters, 'lost_images', 1)
end
if seen then
    redis.call('SET', seen, id .. ' ' .. digest, 'EX', ARGV[3])
end
return {id}
