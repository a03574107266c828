#!lua flags=no-writes
-- Measure the backlog of a shard.
-- KEYS: images, results, dead, counters.  ARGV: the workers' group.
-- Returns {images, pending, lag or null, ever delivered or null, age of the oldest in ms or -1, results, dead,
-- {counter, value, ...}}.

local images, group = KEYS[1], ARGV[1]

local length = redis.call('XLEN', images)
local pending, lag, delivered = 0, length, 0 -- without a group nothing was delivered
local groups = redis.pcall('XINFO', 'GROUPS', images)
if groups['err'] then
    if not string.find(groups['err'], 'no such key', 1, true) then -- where there is no such key, nobody has pushed yet
        return groups
    end
else
    for _, row in ipairs(groups) do
        local info = {}
        for i = 1, #row, 2 do
            info[row[i]] = row[i + 1]
        end
        if info['name'] == group then
            pending, lag, delivered = info['pending'], info['lag'], info['entries-read']
        end
    end
end

-- Entries are delivered in order, so the first one pending is the oldest; XPENDING returns its id without its fields.
local oldest = nil
if pending > 0 then
    oldest = redis.call('XPENDING', images, group)[2]
elseif length > 0 then
    oldest = redis.call('XRANGE', images, '-', '+', 'COUNT', 1)[1][1]
end
local age_ms = -1
if oldest then
    local now = redis.call('TIME')
    age_ms = now[1] * 1000 + math.floor(now[2] / 1000) - string.match(oldest, '^%d+')
end

return {
    length, pending, lag, delivered, age_ms,
    redis.call('XLEN', KEYS[2]), redis.call('XLEN', KEYS[3]), redis.call('HGETALL', KEYS[4]),
}
