#!lua flags=allow-oom
-- Read new entries as a consumer: at most so many, and no further one once they have so many bytes.
-- KEYS: images.  ARGV: group, consumer, count, bytes.
-- Returns {{id, fields}, ...}; does not wait.

local images, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local left_bytes = tonumber(ARGV[4])

local entries = {}
for _ = 1, tonumber(ARGV[3]) do
    local reply = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', images, '>')
    if not reply then
        break
    end
    local entry = reply[1][2][1]
    entries[#entries + 1] = entry
    for _, part in ipairs(entry[2]) do
        left_bytes = left_bytes - #part
    end
    if left_bytes <= 0 then
        break
    end
end
return entries
