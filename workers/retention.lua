#!lua flags=allow-oom
-- Take the oldest entries off a stream, never one that a registered group has still to read.
-- KEYS: stream.  ARGV: how many to keep.  Returns how many were taken off.

local excess = redis.call('XLEN', KEYS[1]) - tonumber(ARGV[1])
if excess <= 0 then
    return 0
end

-- Ids have two numbers of 64 bits, more than Lua's numbers hold: padded to 20 digits they compare as text.
local function padded(id)
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    return string.rep('0', 20 - #ms) .. ms .. string.rep('0', 20 - #seq) .. seq
end

local bound = '18446744073709551615-18446744073709551615'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local about = {}
    for i = 1, #group, 2 do
        about[group[i]] = group[i + 1]
    end
    local first = redis.call('XPENDING', KEYS[1], about['name'])[2] or about['last-delivered-id']
    if padded(first) < padded(bound) then
        bound = first
    end
end

-- LIMIT needs the tilde: whole nodes of the stream only, so a few more than asked for may stay.
return redis.call('XTRIM', KEYS[1], 'MINID', '~', bound, 'LIMIT', excess)
