#!lua flags=allow-oom
-- Remove consumers that were idle for long and have nothing pending: XGROUP DELCONSUMER drops what is pending.
-- KEYS: images.  ARGV: group, the caller's own name, idle ms.
-- Returns how many were removed.

local images, group = KEYS[1], ARGV[1]

local consumers = redis.pcall('XINFO', 'CONSUMERS', images, group)
if consumers['err'] then
    return 0
end
local removed = 0
for _, consumer in ipairs(consumers) do
    local info = {}
    for i = 1, #consumer, 2 do
        info[consumer[i]] = consumer[i + 1]
    end
    if info['name'] ~= ARGV[2] and info['pending'] == 0 and info['idle'] > tonumber(ARGV[3]) then
        redis.call('XGROUP', 'DELCONSUMER', images, group, info['name'])
        removed = removed + 1
    end
end
return removed
