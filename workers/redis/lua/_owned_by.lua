#!lua flags=allow-oom
-- Whose an entry is: the part that publish, touch and release share, put before each of them.
-- The flag lets a server at its memory limit be drained: what is written is smaller than what is deleted.

-- How often an entry was given out; nothing where it is not pending for the consumer.
local function deliveries_to(images, group, consumer, id)
    local pending = redis.pcall('XPENDING', images, group, id, id, 1)
    if pending['err'] then
        -- A server that was emptied has no group: the entry is nobody's any more.
        if string.sub(pending['err'], 1, 7) ~= 'NOGROUP' then
            error(pending)
        end
        return nil
    end
    return pending[1] and pending[1][2] == consumer and pending[1][4] or nil
end

