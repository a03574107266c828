-- Complete entries, each exactly once: write its outcome and remove it from the images stream. Prelude: _owned_by.lua.
-- KEYS: images, results or dead, one per entry ...
-- ARGV: group, consumer, then per entry: id, number of values, field, value, field, value ...
-- Returns for each entry 1 (completed) or 0 (not this consumer's, nothing written).

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local done = {}
local at = 3
for k = 2, #KEYS do
    local id, count = ARGV[at], tonumber(ARGV[at + 1])
    local first = at + 2
    at = first + count
    if deliveries_to(images, group, consumer, id) then
        redis.call('XADD', KEYS[k], '*', unpack(ARGV, first, at - 1))
        redis.call('XACK', images, group, id)
        redis.call('XDEL', images, id)
        done[#done + 1] = 1
    else
        done[#done + 1] = 0
    end
end
return done
