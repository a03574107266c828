#!lua flags=allow-oom
-- Take entries off a stream that are past a number or an age, the oldest first, never one that a registered group has
-- still to read or to acknowledge.
-- KEYS: stream, counters.  ARGV: how many to keep, how long to keep them in ms, most to take off at once.
-- Returns {how many were taken off, 1 if another call finds more to do}.

local stream, counters, at_once = KEYS[1], KEYS[2], tonumber(ARGV[3])

local length = redis.call('XLEN', stream)
if length == 0 then
    return {0, 0}
end

-- Ids have two numbers of 64 bits, more than Lua's numbers hold: padded to 20 digits they compare as text.
local function padded(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return string.rep('0', 20 - #ms) .. ms .. string.rep('0', 20 - #seq) .. seq
end

local function earlier(one, other)
    return padded(one) < padded(other) and one or other
end

local bound = '18446744073709551615-18446744073709551615'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local about = {}
    for i = 1, #group, 2 do
        about[group[i]] = group[i + 1]
    end
    bound = earlier(redis.call('XPENDING', stream, about['name'])[2] or about['last-delivered-id'], bound)
end

local taken = 0

-- Without the tilde a limit is refused, and with it whole nodes of the stream go, so a few too many may stay.
local excess = length - tonumber(ARGV[1])
if excess > 0 then
    taken = redis.call('XTRIM', stream, 'MINID', '~', bound, 'LIMIT', math.min(excess, at_once))
end

if taken <= at_once / 2 then
    local now = redis.call('TIME')
    local oldest_ms = now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(ARGV[2])
    if oldest_ms > 0 then
        local too_old = earlier(string.format('%.0f-0', oldest_ms), bound)
        local left = at_once - taken
        local aged = redis.call('XTRIM', stream, 'MINID', '~', too_old, 'LIMIT', left)
        if aged <= left / 2 then
            -- No whole node is left of what is too old: this looks into one node only.
            aged = aged + redis.call('XTRIM', stream, 'MINID', '=', too_old)
        end
        taken = taken + aged
    end
end

if taken > 0 then
    redis.call('HINCRBY', counters, 'trimmed_results', taken)
end
return {taken, taken > at_once / 2 and 1 or 0}
