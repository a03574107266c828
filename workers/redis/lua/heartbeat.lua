-- Renew the idle time of entries that the caller owns, so that no other consumer claims them. Prelude: _owned_by.lua.
-- KEYS: images.  ARGV: group, consumer, ids ...
-- Returns how many the caller owns.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local renewed = 0
for i = 3, #ARGV do
    if deliveries_to(images, group, consumer, ARGV[i]) then
        -- JUSTID: the delivery count stays
        redis.call('XCLAIM', images, group, consumer, 0, ARGV[i], 'JUSTID')
        renewed = renewed + 1
    end
end
return renewed
