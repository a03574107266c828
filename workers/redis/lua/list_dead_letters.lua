#!lua flags=no-writes
-- List one page of dead letters without their images.
-- KEYS: dead.  ARGV: XRANGE or XREVRANGE, from, to, most entries to look at, most bytes to look at, a reason,
-- or '*' for any dead letter, or '' for foreign entries too.
-- Returns {the last id looked at, or '' at the end; {id, reason, message id} ...}.
-- The reason of a foreign entry is ''; a message id of '' is absent, or too long.

local backwards, from, to, reason = ARGV[1] == 'XREVRANGE', ARGV[2], ARGV[3], ARGV[6]
local left, left_bytes = tonumber(ARGV[4]), tonumber(ARGV[5])

local found = {''}
while true do
    -- One at a time: an entry's size is known only once it is read.
    local entry
    if backwards then
        entry = redis.call('XREVRANGE', KEYS[1], from, to, 'COUNT', 1)[1]
    else
        entry = redis.call('XRANGE', KEYS[1], from, to, 'COUNT', 1)[1]
    end
    if not entry then
        return found
    end
    local id, fields = entry[1], entry[2]
    local entry_reason, message_id = '', ''
    for i = 1, #fields, 2 do
        left_bytes = left_bytes - #fields[i] - #fields[i + 1]
        if fields[i] == 'dead.reason' then
            entry_reason = fields[i + 1]
        elseif fields[i] == 'id' and #fields[i + 1] <= 1024 then
            message_id = fields[i + 1]
        end
    end
    if reason == '' or entry_reason == reason or (reason == '*' and entry_reason ~= '') then
        found[#found + 1] = {id, entry_reason, message_id}
    end
    left = left - 1
    if left <= 0 or left_bytes <= 0 then
        found[1] = id
        return found
    end
    from = '(' .. id
end
