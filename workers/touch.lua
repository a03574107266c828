#!lua flags=allow-oom
-- Say that entries are still under work, so that no other consumer claims them; only of those that are the caller's.
-- KEYS: images.  ARGV: group, consumer, ids ...
-- Returns how many were the caller's.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]

local touched = 0
for i = 3, #ARGV do
    local pending = redis.pcall('XPENDING', images, group, ARGV[i], ARGV[i], 1)
    if pending['err'] then
        if string.sub(pending['err'], 1, 7) ~= 'NOGROUP' then
            return pending
        end
    elseif pending[1] and pending[1][2] == consumer then
        -- JUSTID: the delivery count stays
        redis.call('XCLAIM', images, group, consumer, 0, ARGV[i], 'JUSTID')
        touched = touched + 1
    end
end
return touched
