#!lua flags=no-writes
-- Look through dead letters, and tell what they are without handing out their images.
-- KEYS: dead.  ARGV: XRANGE or XREVRANGE, from, to, most letters to look at, most bytes to look at, a reason,
-- or '*' for any that is ours, or '' for those of others too.
-- Returns {the last id looked at, or '' where there is nothing further; {id, reason, message id} ...}.
-- A reason of '' stands for an entry of others, a message id of '' for none, or for one that is too long.

local backwards, from, to, reason = ARGV[1] == 'XREVRANGE', ARGV[2], ARGV[3], ARGV[6]
local left, left_bytes = tonumber(ARGV[4]), tonumber(ARGV[5])

local found = {''}
while true do
    -- One at a time: how large an entry is shows only when it is read.
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
    local why, message_id = '', ''
    for i = 1, #fields, 2 do
        left_bytes = left_bytes - #fields[i] - #fields[i + 1]
        if fields[i] == 'dead.reason' then
            why = fields[i + 1]
        elseif fields[i] == 'id' and #fields[i + 1] <= 1024 then
            message_id = fields[i + 1]
        end
    end
    if reason == '' or why == reason or (reason == '*' and why ~= '') then
        found[#found + 1] = {id, why, message_id}
    end
    left = left - 1
    if left <= 0 or left_bytes <= 0 then
        found[1] = id
        return found
    end
    from = '(' .. id
end
