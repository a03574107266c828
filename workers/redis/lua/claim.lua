#!lua flags=allow-oom
-- Claim entries that were idle for too long, but none that the caller has in flight.
-- KEYS: images.  ARGV: group, consumer, min idle ms, cursor, count, ids in flight ...
-- Returns {cursor, {{id, fields, deliveries}, ...}}.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local in_flight = {}
for i = 6, #ARGV do
    in_flight[ARGV[i]] = true
end

-- JUSTID leaves the delivery count alone: an entry in flight is not redelivered, and so not counted.
-- XAUTOCLAIM also removes ids whose entry was deleted from the pending list.
local found = redis.call('XAUTOCLAIM', images, group, consumer, ARGV[3], ARGV[4], 'COUNT', ARGV[5], 'JUSTID')

local entries = {}
for _, id in ipairs(found[2]) do
    if not in_flight[id] then
        local claimed = redis.call('XCLAIM', images, group, consumer, 0, id)
        local pending = redis.call('XPENDING', images, group, id, id, 1)
        if claimed[1] and pending[1] then
            entries[#entries + 1] = {id, claimed[1][2], pending[1][4]}
        end
    end
end
return {found[1], entries}
