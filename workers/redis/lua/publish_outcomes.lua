-- Complete entries, each exactly once: write its outcome and remove it from the images stream. Prelude: _owned_by.lua.
-- KEYS: images, results or dead, one per entry ...
-- ARGV: group, consumer, the key that has since when outcomes are remembered, then per entry: id, the key that remembers
-- its producer's id or '', number of values, field, value, field, value ...
-- Returns for each entry 1 (completed) or 0 (not this consumer's, nothing written).
-- The keys that remember are not declared, and refusals are ignored: access rules of older releases do not have them.

local images, group, consumer, since = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

-- Remember that an entry has its outcome, so that a repeated push is confirmed. A plain XADD is not remembered.
local function remember(seen, id)
    local remembered = redis.pcall('GET', seen)
    if type(remembered) == 'string' and string.match(remembered, '^(%S+) %S+$') == id then
        redis.pcall('APPEND', seen, ' done')
        local now = redis.call('TIME')
        redis.pcall('SET', since, now[1] .. string.format('%03d', math.floor(now[2] / 1000)), 'NX')
    end
end

local done = {}
local at = 4
for k = 2, #KEYS do
    local id, seen, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
    local first = at + 3
    at = first + count
    if deliveries_to(images, group, consumer, id) then
        redis.call('XADD', KEYS[k], '*', unpack(ARGV, first, at - 1))
        redis.call('XACK', images, group, id)
        redis.call('XDEL', images, id)
        if seen ~= '' then
            remember(seen, id)
        end
        done[#done + 1] = 1
    else
        done[#done + 1] = 0
    end
end
return done
