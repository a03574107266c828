#!lua flags=allow-oom
-- Hand entries back: the next consumer that looks may claim them at once, and this delivery does not count.
-- KEYS: images.  ARGV: group, consumer, idle ms to pretend, ids ...
-- Returns how many were the caller's.

local images, group, consumer, idle_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

local released = 0
for i = 4, #ARGV do
    local pending = redis.pcall('XPENDING', images, group, ARGV[i], ARGV[i], 1)
    if pending['err'] then
        if string.sub(pending['err'], 1, 7) ~= 'NOGROUP' then
            return pending
        end
    elseif pending[1] and pending[1][2] == consumer then
        local before = math.max(pending[1][4] - 1, 0)
        redis.call('XCLAIM', images, group, consumer, 0, ARGV[i], 'IDLE', idle_ms, 'RETRYCOUNT', before, 'JUSTID')
        released = released + 1
    end
end
return released
