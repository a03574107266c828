#!lua flags=allow-oom
-- Make entries claimable that no claim finds: orphans, and entries whose last delivery lies in the future.
-- KEYS: images.  ARGV: group, consumer, idle ms to give to orphans (that of a claim: they may be claimed at once),
-- where to start (an XPENDING range: '-' or '(' and an id), most pending entries to look at, most orphans, their bytes.
-- Returns {orphans found, where to go on, or '' where all was seen}.
--
-- An orphan was delivered and is neither completed nor pending: XGROUP DELCONSUMER or another client's XACK left it.
-- A delivery lies in the future where the server's clock was set back since: until it gets there the entry has no idle
-- time. XPENDING shows that as 0; to set 0 means from now on, and changes nothing where it is true.

local images, group, consumer, idle_ms, from = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local most, orphans_left, bytes_left = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local groups = redis.pcall('XINFO', 'GROUPS', images)
if groups['err'] then
    return {0, ''} -- nothing was pushed yet
end
local workers
for _, row in ipairs(groups) do
    local info = {}
    for i = 1, #row, 2 do
        info[row[i]] = row[i + 1]
    end
    if info['name'] == group then
        workers = info
    end
end
if not workers then
    return {0, ''} -- nothing was delivered yet
end

-- The lag is unknown after an entry was deleted that nobody had read.
local lag = workers['lag']
local may_have_orphans = not lag or redis.call('XLEN', images) > workers['pending'] + lag

local orphans = 0

-- Make the orphans of a range pending: one at a time, as an entry's size is known only once it is read.
-- Returns where to go on if there may be more.
local function adopt(first, last)
    while true do
        if orphans_left <= 0 or bytes_left <= 0 then
            return first
        end
        local entry = redis.call('XRANGE', images, first, last, 'COUNT', 1)[1]
        if not entry then
            return nil
        end
        redis.call('XCLAIM', images, group, consumer, 0, entry[1], 'IDLE', idle_ms, 'RETRYCOUNT', 0, 'FORCE', 'JUSTID')
        orphans, orphans_left = orphans + 1, orphans_left - 1
        for _, part in ipairs(entry[2]) do
            bytes_left = bytes_left - #part
        end
        first = '(' .. entry[1]
    end
end

local pending = redis.call('XPENDING', images, group, from, '+', most)
for _, row in ipairs(pending) do
    local id, owner, idle = row[1], row[2], row[3]
    if may_have_orphans then
        local more = adopt(from, '(' .. id)
        if more then
            return {orphans, more}
        end
    end
    if idle == 0 then
        redis.call('XCLAIM', images, group, owner, 0, id, 'IDLE', 0, 'JUSTID')
    end
    from = '(' .. id
end
if #pending == most then
    return {orphans, from}
end
local more = may_have_orphans and adopt(from, workers['last-delivered-id'])
return {orphans, more or ''}
