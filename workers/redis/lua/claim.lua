#!lua flags=allow-oom
-- Take over entries left alone for too long, but none that the caller has in hand.
-- KEYS: images.  ARGV: group, consumer, min idle ms, cursor, count, ids in hand ...
-- Returns {cursor, {{id, fields, deliveries}, ...}}.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local held = {}
for i = 6, #ARGV do
    held[ARGV[i]] = true
end

-- JUSTID leaves the delivery count alone: an entry in hand is not given out again, and so not counted.
-- Ids whose entry was deleted leave the pending list here.
local found = redis.call('XAUTOCLAIM', images, group, consumer, ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'JUSTID')

local entries = {}
for _, id in ipairs(found[2]) do
    if not held[id] then
        local claimed = redis.call('XCLAIM', images, group, consumer, 0, id)
        local pending = redis.call('XPENDING', images, group, id, id, 1)
        if claimed[1] and pending[1] then
            entries[#entries + 1] = {id, claimed[1][2], pending[1][4]}
        end
    end
end
return {found[1], entries}
