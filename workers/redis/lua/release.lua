-- Release entries that the caller owns: this delivery does not count. Prelude: _owned_by.lua.
-- KEYS: images.  ARGV: group, consumer, idle ms to set (that of a claim: they may be claimed at once), ids ...
-- Returns how many the caller owned.

local images, group, consumer, idle_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

local released = 0
for i = 4, #ARGV do
    local deliveries = deliveries_to(images, group, consumer, ARGV[i])
    if deliveries then
        local before = math.max(deliveries - 1, 0)
        redis.call('XCLAIM', images, group, consumer, 0, ARGV[i], 'IDLE', idle_ms, 'RETRYCOUNT', before, 'JUSTID')
        released = released + 1
    end
end
return released
