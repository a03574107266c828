-- Say that entries are still under work, so that no other consumer claims them; only of those that are the caller's.
-- Behind _owned_by.lua.
-- KEYS: images.  ARGV: group, consumer, ids ...
-- Returns how many were the caller's.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local touched = 0
for i = 3, #ARGV do
    if deliveries_to(images, group, consumer, ARGV[i]) then
        -- JUSTID: the delivery count stays
        redis.call('XCLAIM', images, group, consumer, 0, ARGV[i], 'JUSTID')
        touched = touched + 1
    end
end
return touched
