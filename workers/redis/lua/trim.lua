#!lua flags=allow-oom
-- Trim a stream to a length and an age, the oldest entries first, but never one that a registered group has still to
-- read or acknowledge.
-- KEYS: stream, counters.  ARGV: how many to keep, how long to keep them in ms, most to remove in one call.
-- Returns {how many were removed, 1 if another call may find more}.

local stream, counters, at_once = KEYS[1], KEYS[2], tonumber(ARGV[3])

local length = redis.call('XLEN', stream)
if length == 0 then
    return {0, 0}
end

-- Ids are two numbers of 64 bits, more than a Lua number holds: padded to 20 digits they compare as text.
local function padded(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return string.rep('0', 20 - #ms) .. ms .. string.rep('0', 20 - #seq) .. seq
end

local function earlier(one, other)
    return padded(one) < padded(other) and one or other
end

local bound = '18446744073709551615-18446744073709551615'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local info = {}
    for i = 1, #group, 2 do
        info[group[i]] = group[i + 1]
    end
    bound = earlier(redis.call('XPENDING', stream, info['name'])[2] or info['last-delivered-id'], bound)
end

local removed = 0

-- LIMIT needs the tilde, which removes whole nodes of the stream only, so a few too many may stay.
local excess = length - tonumber(ARGV[1])
if excess > 0 then
    removed = redis.call('XTRIM', stream, 'MINID', '~', bound, 'LIMIT', math.min(excess, at_once))
end

if removed <= at_once / 2 then
    local now = redis.call('TIME')
    local oldest_ms = now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(ARGV[2])
    if oldest_ms > 0 then
        local too_old = earlier(string.format('%.0f-0', oldest_ms), bound)
        local left = at_once - removed
        local aged = redis.call('XTRIM', stream, 'MINID', '~', too_old, 'LIMIT', left)
        if aged <= left / 2 then
            -- No whole node is too old any more: this looks into one node only.
            aged = aged + redis.call('XTRIM', stream, 'MINID', '=', too_old)
        end
        removed = removed + aged
    end
end

if removed > 0 then
    redis.call('HINCRBY', counters, 'trimmed_results', removed)
end
return {removed, removed > at_once / 2 and 1 or 0}
