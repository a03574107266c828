#!lua flags=allow-oom
-- Remove consumers that have not asked for long and have nothing pending: deleting one drops what it has pending.
-- KEYS: images.  ARGV: group, the caller's own name, idle ms.
-- Returns how many were removed.

local images, group = KEYS[1], ARGV[1]

local consumers = redis.pcall('XINFO', 'CONSUMERS', images, group)
if consumers['err'] then
    return 0
end
local removed = 0
for _, consumer in ipairs(consumers) do
    local about = {}
    for i = 1, #consumer, 2 do
        about[consumer[i]] = consumer[i + 1]
    end
    if about['name'] ~= ARGV[2] and about['pending'] == 0 and about['idle'] > tonumber(ARGV[3]) then
        redis.call('XGROUP', 'DELCONSUMER', images, group, about['name'])
        removed = removed + 1
    end
end
return removed
